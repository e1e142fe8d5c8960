"""What the training loop asks of a backend, and the bookkeeping that both backends share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from actors.rollout import RolloutReport
from learner.gflownet import EvaluationWeights

MAX_EMPTY_BATCHES = 5


class RunFailed(RuntimeError):
    """A run that cannot go on; the message holds the cause."""


@dataclass
class Accounting:
    """Where every trajectory went: num_sampled = num_stored + num_dropped + num_in_flight, at all times."""

    num_sampled: int = 0
    """Trajectories drawn by rollout workers, as far as they reported."""
    num_stored: int = 0
    """Accepted by the replay buffer (evicted ones included)."""
    num_rejected: int = 0
    """Dropped because their score was NaN, infinite or negative."""
    num_lost: int = 0
    """Dropped because a buffer or a node died before they were stored or saved."""
    num_in_flight: int = 0
    """On their way to the replay buffer."""
    num_trained: int = 0
    """Fresh trajectories that the learner trained the policy on."""
    num_stale: int = 0
    """Stored, but too old to be trained on as fresh."""
    num_restarts: int = 0
    """Actors started anew."""
    policy_version: int = 0
    """Version of the newest weights; rises by one with every learner call, also across restarts."""
    cpu_seconds: float = 0.0
    """CPU time of all processes of the run, earlier sessions of a resumed run included."""
    lags: list[int] = field(default_factory=list)
    """Policy lag in versions, queue time included, of the batches trained on since the last `take_lags`."""

    empty_batches: int = 0
    """Batches in a row of which every trajectory was rejected."""

    def count_rollout(self, report: RolloutReport) -> int:
        """Book a rollout and return its number of valid trajectories; raises RunFailed after too many without any."""
        count = report.num_sampled - report.num_rejected
        self.num_sampled += report.num_sampled
        self.num_rejected += report.num_rejected
        self.empty_batches = 0 if count else self.empty_batches + 1
        if self.empty_batches >= MAX_EMPTY_BATCHES:
            raise RunFailed(f"{MAX_EMPTY_BATCHES} batches in a row had no valid score; see the warnings above")
        return count

    def count_offline(self, report: RolloutReport) -> None:
        """Book the rejected ones of an offline rollout; the others are no part of the run's own trajectories."""
        self.num_sampled += report.num_rejected
        self.num_rejected += report.num_rejected

    @property
    def num_dropped(self) -> int:
        """Rejected and lost ones."""
        return self.num_rejected + self.num_lost

    @property
    def balanced(self) -> bool:
        """The invariant."""
        return self.num_sampled == self.num_stored + self.num_dropped + self.num_in_flight

    def take_lags(self) -> dict[str, float]:
        """Minimum, mean and maximum of the policy lag since the last call."""
        lags, self.lags = self.lags, []
        if not lags:
            return {}
        return {"policy_lag_min": min(lags), "policy_lag": sum(lags) / len(lags), "policy_lag_max": max(lags)}

    def counts(self) -> dict[str, float]:
        """The counters, by their names in metrics."""
        names = (
            "num_sampled", "num_stored", "num_rejected", "num_lost", "num_dropped", "num_in_flight", "num_trained",
            "num_stale", "num_restarts", "policy_version",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: trajectories in flight at a save never arrive, so they count as lost."""
        names = (
            "num_sampled",
            "num_stored",
            "num_rejected",
            "num_trained",
            "num_stale",
            "num_restarts",
            "policy_version",
        )
        state = {name: getattr(self, name) for name in names}
        return state | {"num_lost": self.num_lost + self.num_in_flight, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; raises ValueError for what is none."""
        for name in self.state_dict():
            value = state.get(name)
            kinds = (int, float) if name == "cpu_seconds" else (int,)
            if not isinstance(value, kinds) or isinstance(value, bool) or not abs(value) < 2**63:
                raise ValueError(f"{name}: got {str(value)[:40]!r}; allowed: a finite number")
            setattr(self, name, value)

    def set_stored(self, num_stored: int) -> None:
        """Take over the number that a restored buffer holds; what it lacks is lost."""
        self.num_lost += self.num_stored - num_stored
        self.num_stored = num_stored


class StepResult(NamedTuple):
    """One call of the learner."""

    step: int
    """Learner steps done."""
    metrics: dict[str, float]


class Backend(Protocol):
    """Runs rollouts, replay and learner; one process or many."""

    accounting: Accounting

    def start(self, checkpoint: Path | None) -> None:
        """Make all parts, from `checkpoint` if one is given."""
        ...

    def step(self) -> StepResult | None:
        """Go on until the next call of the learner is done; None if nothing was done for a second."""
        ...

    def drain(self) -> StepResult | None:
        """Finish calls under way, so that counters and learner stand still; returns the last call of the learner."""
        ...

    def evaluation_weights(self) -> EvaluationWeights:
        """The averaged policy and the dynamics model."""
        ...

    def statistics(self) -> dict[str, float]:
        """State of the replay buffer."""
        ...

    def seeds(self) -> dict[str, int]:
        """Of every actor there was in this session, restarted ones included, the seed that it drew with."""
        ...

    def save(self, folder: Path) -> dict[str, Any]:
        """Write learner and buffer into `folder`; returns what else the backend needs to go on, JSON-able."""
        ...

    def close(self) -> None:
        """End all processes."""
        ...
