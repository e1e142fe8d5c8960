"""The Ray backend: rollout actors, a buffer actor and a learner actor, kept busy by a driver that moves only references.

A rollout's batch goes by reference to the buffer and to the learner. Dead actors are replaced a bounded number of
times: rollout actors with a new seed, buffer and learner from the newest checkpoint.
"""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from actors.rollout import RolloutReport
from actors.trajectories import OFFLINE_VERSION
from distributed.backend import Accounting, RunFailed, StepResult
from distributed.checkpoints import BUFFER_FILE, STATE_FILE, CheckpointStore, load_state
from distributed.config import ExperimentConfig
from distributed.experiment import (
    actor_seeds,
    make_environment,
    make_oracle,
    num_dynamics_trajectories,
    offline_sequences,
    replay_buffer_maker,
)
from distributed.ray_actors import RemoteLearnerActor
from distributed.ray_calls import Calls, FreshBatch, Pending, Slot
from distributed.ray_faults import INFRASTRUCTURE, cause, count_death, last_line, raise_if_fault, reason
from distributed.ray_gauges import RunGauges
from distributed.ray_replay import RemoteReplayBufferActor
from distributed.ray_runtime import DRIVER_BUNDLE, LEARNER_BUNDLE, beside_driver, connect, learner_gpus
from distributed.rollout_pool import RolloutPool
from learner.gflownet import EvaluationWeights

logger = logging.getLogger(__name__)
MAX_INCARNATIONS = 1_000_000
"""Restarts of an actor for which a session has names and seeds of its own."""
MAX_UPDATES_IN_FLIGHT = 2
MAX_ADDS_IN_FLIGHT = 8
POLL_SECONDS = 0.2


class RayBackend:
    """Bounded queues between N rollout actors, one buffer and one learner."""

    def __init__(self, config: ExperimentConfig, store: CheckpointStore):
        self.config, self.store, self.accounting = config, store, Accounting()
        self._calls = Calls(config.actors.timeout_seconds)
        self._fresh: deque[FreshBatch] = deque()
        self._ended: deque[Any] = deque()
        self._unsent: list[Pending] = []
        self._numbers: Counter[str] = Counter()
        self._cpu: dict[str, float] = {}
        self._earlier_cpu_seconds, self._session = 0.0, 0
        self._times: dict[str, list[float]] = {}
        self._looked = 0.0
        self._num_designs = getattr(config.generator, "num_designs", 0)
        self._gauges: RunGauges | None = None
        self._newest: dict[str, float] = {}
        self._owns_ray, self._is_offline = False, False
        self._pool = RolloutPool(config, self._calls, self.accounting)

    def start(self, checkpoint: Path | None) -> None:
        """Connect, make the actors (from `checkpoint`, if given), and prefill the offline data if there is no checkpoint."""
        self._owns_ray = connect(self.config)
        self._gauges = RunGauges(self.config.run.name or "unnamed")
        if checkpoint is not None:
            state = load_state(checkpoint)["backend"]
            self.accounting.load_state_dict(state["accounting"])
            if type(state.get("session")) is not int:
                raise RunFailed(f"{checkpoint / STATE_FILE}: damaged (session: allowed is a whole number)")
            self._session = state["session"] + 1
        self._earlier_cpu_seconds = self.accounting.cpu_seconds
        first = self._session * MAX_INCARNATIONS
        self._learner = Slot("learner", 0, self._make_learner(checkpoint), first)
        self._buffer = Slot("buffer", 0, self._make_buffer(checkpoint), first)
        self._pool.start(first)
        _, num_stored = self._ask(lambda: self._buffer.handle.ready.remote())
        self.accounting.set_stored(num_stored)
        self._broadcast_from_learner()
        if checkpoint is None:
            self._prefill()

    def _broadcast_from_learner(self) -> None:
        self._is_offline = self._ask(lambda: self._learner.handle.is_offline.remote())
        weights = ray.put(self._ask(lambda: self._learner.handle.weights.remote()))
        self._pool.set_weights(weights, self.accounting.policy_version)

    def _make_learner(self, checkpoint: Path | None) -> Any:
        actors = self.config.actors
        options = RemoteLearnerActor.options(
            num_cpus=actors.learner_num_cpus,
            num_gpus=learner_gpus(self.config),
            scheduling_strategy=beside_driver(LEARNER_BUNDLE),
        )
        return options.remote(self.config, checkpoint)

    def _make_buffer(self, checkpoint: Path | None) -> Any:
        return RemoteReplayBufferActor.options(scheduling_strategy=beside_driver(DRIVER_BUNDLE)).remote(
            replay_buffer_maker(self.config), None if checkpoint is None else checkpoint / BUFFER_FILE
        )

    def _prefill(self) -> None:
        if self.config.replay.offline_source == "none":
            return
        environment = make_environment(self.config)
        oracle = make_oracle(self.config, environment)
        offline = offline_sequences(self.config, environment, oracle)
        oracle.close()
        assert offline is not None
        batches = self._pool.draw_offline(*offline)
        self._ask(lambda: self._buffer.handle.set_offline.remote(*batches))

    def step(self) -> StepResult | None:
        """Serve whatever call ends next until one of the learner's does; None after a second without."""
        if time.monotonic() - self._looked > POLL_SECONDS:
            self._looked = time.monotonic()
            self._replace_overdue()
            self._pool.adjust()
            self._show()
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            while self._ended:
                reference = self._ended.popleft()
                result = self._finish(reference) if reference in self._calls else None
                if result is not None:
                    return result
            if self._calls.count("add") < MAX_ADDS_IN_FLIGHT and not self._is_offline:  # else the buffer lags behind
                self._pool.submit(num_waiting=len(self._fresh))
            self._submit_updates()
            self._ended.extend(self._calls.ended(POLL_SECONDS))
        return None

    def drain(self) -> StepResult | None:
        """Finish what the learner and the buffer were given; rollouts under way are forgotten, and never counted."""
        last = None
        self._calls.take(kinds=["rollout"])
        self._ended.clear()
        while self._calls:
            ended = self._calls.ended(POLL_SECONDS)
            if not ended:
                self._replace_overdue()
            for reference in ended:
                if reference in self._calls:
                    last = self._finish(reference) or last
        return last

    def _submit_updates(self) -> None:
        """Keep the learner busy; a call takes as many waiting batches as fit one of its own, so small ones go together."""
        if self._is_offline:
            if not self._calls.count("update"):
                metrics, weights = self._learner.handle.offline_update.remote()
                self._track(metrics, "update", self._learner, weights=weights)
            return
        while self._fresh and self._calls.count("update") < MAX_UPDATES_IN_FLIGHT:
            taken, count = list[FreshBatch](), 0
            while self._fresh and (not taken or count + self._fresh[0].count <= self.config.learner.batch_size):
                batch = self._fresh.popleft()
                if self._is_stale(batch):
                    self.accounting.num_stale += batch.count
                else:
                    taken.append(batch)
                    count += batch.count
            if not taken:
                continue
            draw = self._buffer.handle.draw.remote(count, num_dynamics_trajectories(self.config, count))
            metrics, weights = self._learner.handle.update.remote(draw, *(batch.reference for batch in taken))
            self._track(metrics, "update", self._learner, fresh=taken, weights=weights)

    def _is_stale(self, batch: FreshBatch) -> bool:
        """Whether the learner will be too many versions ahead when it comes to `batch`."""
        limit = self.config.actors.policy_lag_limit(len(self._pool.slots))
        return self.accounting.policy_version + self._calls.count("update") - batch.version > limit

    def _score_designs(self) -> None:
        """Sequences that the learner wants to know more of go through an oracle into the buffer."""
        if self._num_designs and self._pool.slots:
            slot = min(self._pool.slots, key=lambda slot: slot.num_calls)
            designs = self._learner.handle.take_designs.remote()
            batch, report = slot.handle.rollout_designs.remote(designs)
            self._track(report, "rollout", slot, batch=batch, source=slot.source)

    def _submit_add(self, batch: Any, count: int, source: str, number: int) -> None:
        reference = self._buffer.handle.add.remote(batch, source, number)
        self._track(reference, "add", self._buffer, batch=batch, count=count, source=source, number=number)

    def _track(self, reference: Any, kind: str, slot: Slot, **details: Any) -> None:
        self._calls.add(reference, Pending(kind, slot, slot.handle, **details))

    def _finish(self, reference: Any) -> StepResult | None:
        call = self._calls.pop(reference)
        try:
            value = ray.get(reference, timeout=self.config.actors.timeout_seconds)
        except (RayTaskError, *INFRASTRUCTURE) as error:
            self._failed(call, error)
            return None
        if call.kind == "rollout":
            self._rollout_done(call, value)
        elif call.kind == "add":
            self._add_done(call, value)
        else:
            return self._update_done(call, value)
        return None

    def _rollout_done(self, call: Pending, report: RolloutReport) -> None:
        self._cpu[call.source] = report.cpu_seconds
        call.slot.silent_since = None
        for name in ("rollout_seconds", "oracle_seconds"):
            self._times.setdefault(name, []).append(getattr(report, name))
        if not report.num_sampled:  # a learner that was replaced had no designs to be scored
            return
        count = self.accounting.count_rollout(report)
        if not count:
            return
        self.accounting.num_in_flight += count
        self._submit_add(call.batch, count, call.source, self._numbers[call.source])
        self._numbers[call.source] += 1
        if report.policy_version != OFFLINE_VERSION:
            self._fresh.append(FreshBatch(call.batch, count, report.policy_version))

    def _add_done(self, call: Pending, accepted: int) -> None:
        """A batch that the buffer already had before it was restored is among those that `set_stored` counted."""
        self.accounting.num_in_flight -= call.count
        self.accounting.num_stored += accepted
        self.accounting.num_lost += call.count - accepted

    def _update_done(self, call: Pending, metrics: dict[str, float]) -> StepResult:
        accounting = self.accounting
        accounting.lags += [accounting.policy_version - batch.version for batch in call.fresh]
        accounting.policy_version += 1
        accounting.num_trained += sum(batch.count for batch in call.fresh)
        if accounting.policy_version - self._pool.version >= self.config.actors.broadcast_every:
            self._pool.set_weights(call.weights, accounting.policy_version)
        self._cpu[self._learner.source] = metrics.pop("learner_cpu_seconds")
        accounting.cpu_seconds = self._earlier_cpu_seconds + time.process_time() + sum(self._cpu.values())
        self._newest |= {"learner_utilisation": metrics["learner_utilisation"]}
        if call.fresh:
            self._newest["policy_lag"] = accounting.lags[-1]
            self._score_designs()
        self._is_offline = bool(metrics.pop("is_offline", False))
        times, self._times = self._times, {}
        means = {name: math.fsum(values) / len(values) for name, values in times.items()}
        return StepResult(int(metrics.pop("step")), metrics | means | self._queues())

    def _show(self) -> None:
        if self._gauges is not None and self._gauges.due:
            figures = self._newest | self._queues() | {"num_restarts": self.accounting.num_restarts}
            self._gauges.update(self.accounting.num_sampled, figures)

    def _queues(self) -> dict[str, float]:
        """Actors and the lengths of the queues."""
        return {
            "num_rollout_actors": len(self._pool.slots),
            "num_rollout_calls": self._calls.count("rollout"),
            "num_waiting_batches": len(self._fresh),
            "num_waiting_adds": self._calls.count("add"),
        }

    def _failed(self, call: Pending, error: Exception) -> None:
        """Recover from a failed call, or raise RunFailed if it was no matter of a dead process or node."""
        if call.kind == "rollout":
            self._pool.failed(call, error)
            return
        raise_if_fault(error)
        lost = isinstance(cause(error), ObjectLostError)  # its node died with the batch
        if call.kind == "add" and not lost:
            self._unsent.append(call)
        self._replace_dead(error)
        if call.kind == "update" and not lost:
            self._fresh.extendleft(reversed(call.fresh))
        elif call.kind == "add" and lost:
            self.accounting.num_in_flight -= call.count
            self.accounting.num_lost += call.count
        self._resend()

    def _resend(self) -> None:
        """Add again what did not arrive, in the order of the numbers, by which the buffer knows duplicates."""
        unsent, self._unsent = sorted(self._unsent, key=lambda call: call.number), []
        for call in unsent:
            self._submit_add(call.batch, call.count, call.source, call.number)

    def _replace_overdue(self) -> None:
        for reference in self._calls.overdue():
            if reference in self._calls:
                call = self._calls.pop(reference)
                ray.kill(call.handle, no_restart=True)
                self._failed(call, GetTimeoutError(f"{call.slot.role} {call.slot.index} gave no answer in time"))

    def _replace_dead(self, error: Exception) -> None:
        """Replace learner and buffer if they do not answer."""
        for slot in (self._learner, self._buffer):
            try:
                ray.get(slot.handle.ready.remote(), timeout=self.config.actors.timeout_seconds)
            except INFRASTRUCTURE as silence:
                self._restart(slot, silence if isinstance(silence, RayActorError) else error)

    def _restart(self, slot: Slot, error: Exception) -> None:
        count_death(slot, error, self.config.actors.max_restarts)
        self.accounting.num_restarts += 1
        checkpoint = next(iter(self.store.newest_first()), None)
        if slot.role == "learner":
            slot.handle = self._make_learner(checkpoint)
            self.accounting.policy_version += 1
            self._broadcast_from_learner()
        else:
            self._unsent += self._calls.take(kinds=["add"])
            slot.handle = self._make_buffer(checkpoint)
            _, num_stored = self._ask(lambda: slot.handle.ready.remote())
            self.accounting.set_stored(num_stored)
            self._resend()

    def _ask(self, call: Callable[[], Any], tries: int = 3) -> Any:
        """The answer to a call of learner or buffer; replaces them if they die meanwhile."""
        for attempt in range(tries):
            try:
                return ray.get(call(), timeout=self.config.actors.timeout_seconds)
            except (RayTaskError, *INFRASTRUCTURE) as error:
                raise_if_fault(error)
                if attempt + 1 == tries:
                    raise RunFailed(f"no answer after {tries} tries: {reason(error)}") from error
                self._replace_dead(error)

    def evaluation_weights(self) -> EvaluationWeights:
        """The averaged policy and the dynamics model."""
        return self._ask(lambda: self._learner.handle.evaluation_weights.remote())

    def statistics(self) -> dict[str, float]:
        """State of the replay buffer."""
        statistics = self._ask(lambda: self._buffer.handle.statistics.remote())
        self._cpu[self._buffer.source] = statistics.pop("buffer_cpu_seconds")
        return statistics

    def seeds(self) -> dict[str, int]:
        """Of learner, buffer and all rollout actors."""
        return actor_seeds(self.config, self._pool.made)

    def save(self, folder: Path) -> dict[str, Any]:
        """Have learner and buffer write themselves; raises OSError if they cannot, or died meanwhile."""
        calls = [self._learner.handle.save.remote(folder), self._buffer.handle.save.remote(folder / BUFFER_FILE)]
        try:
            ray.get(calls, timeout=self.config.actors.timeout_seconds)
        except (RayTaskError, *INFRASTRUCTURE) as error:
            if isinstance(cause(error), OSError):
                raise OSError(last_line(error)) from error
            raise_if_fault(error)
            self._replace_dead(error)
            raise OSError(reason(error)) from error
        return {"accounting": self.accounting.state_dict(), "session": self._session}

    def close(self) -> None:
        """End all actors, and Ray if this backend started it."""
        if not ray.is_initialized():
            return
        for slot in (getattr(self, name) for name in ("_learner", "_buffer") if hasattr(self, name)):
            ray.kill(slot.handle, no_restart=True)
        self._pool.close()
        self._ended.clear()
        self._fresh.clear()
        if self._owns_ray:
            ray.shutdown()
