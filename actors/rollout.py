"""The rollout worker: draws trajectories from the current policy in the noisy environment and has them scored.

Shapes: B trajectories, T steps, A actions, N distinct prefixes at a step.
"""

import logging
import time
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from actors.environments.noise import NoiseSampler
from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import Oracle
from actors.trajectories import OFFLINE_VERSION, TrajectoryBatch, empty_batch
from learner.configs import StrictConfig
from learner.flat import FlatParameters
from learner.networks.context import Context
from learner.networks.prefixes import group_children, join_symbols, num_symbols
from learner.policy import Policy
from learner.precision import autocast
from learner.rewards import valid_scores

logger = logging.getLogger(__name__)
MAX_LOGGED_REJECTIONS = 5
"""Rejected sequences named in the log for each batch; the others are counted."""


class ActorsConfig(StrictConfig):
    """Rollout actors and how they explore."""

    num_rollout_actors: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = 1
    """Rollout actors (run.backend ray); auto: as many as the cluster has CPUs for, coming and going with its nodes."""
    max_rollout_actors: int | None = Field(None, ge=1, le=100_000)
    """auto: at most so many; an autoscaling cluster is asked for room for all of them. null: no limit, and nothing asked."""
    rollout_resource: str | None = Field(None, min_length=1)
    """Custom resource of the nodes on which rollout actors may run; null: all nodes."""
    batch_size: int = Field(1024, ge=1, le=1_000_000)
    """Trajectories of one rollout call; a few hundred at least, as each call costs a message."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Temperature of the behaviour policy; loss and evaluation always use 1."""
    epsilon: float = Field(0.0, ge=0, le=1)
    """Share of a uniform policy mixed into the behaviour policy; loss and evaluation always use 0."""
    max_in_flight: int = Field(2, ge=1, le=64)
    """Rollout calls under way at each actor (run.backend ray): while the scores of one are waited for, another is drawn."""
    broadcast_every: int = Field(1, ge=1, le=100_000)
    """Learner calls after which the actors get new weights (run.backend ray); with hundreds of nodes, fewer broadcasts."""
    max_policy_lag: int | None = Field(None, ge=0)
    """A batch drawn by weights that are more versions older than this is stored for replay, but not trained on as fresh;
    null: 7, broadcast_every, and 4 for each rollout call that may be under way."""
    max_restarts: int = Field(5, ge=0)
    """How often each actor is started anew after it died, before the run ends with the cause."""
    timeout_seconds: float = Field(600.0, gt=0)
    """An actor whose call takes longer is taken for dead."""
    num_cpus: float = Field(0.5, ge=0)
    """CPU share that Ray reserves for a rollout actor."""
    learner_num_cpus: float = Field(1.0, ge=0)
    """CPUs that Ray reserves for the learner, which also sets its number of threads."""
    learner_num_gpus: float = Field(1.0, ge=0)
    """GPUs, or the share of one, for the learner, if learner.device allows and the cluster has any."""

    def policy_lag_limit(self, num_rollout_actors: int) -> int:
        """`max_policy_lag`, or what it is with so many actors where none is given."""
        default = 7 + self.broadcast_every + 4 * num_rollout_actors * self.max_in_flight
        return default if self.max_policy_lag is None else self.max_policy_lag


@dataclass(frozen=True, kw_only=True)
class RolloutReport:
    """What a rollout call says of itself besides its trajectories."""

    num_sampled: int
    """Trajectories drawn, the rejected ones included."""
    num_rejected: int
    """Trajectories whose score was NaN, infinite or negative."""
    policy_version: int
    """Version of the weights that drew them; `OFFLINE_VERSION` for offline ones."""
    rollout_seconds: float
    """Wall time of drawing."""
    oracle_seconds: float
    """Wall time of scoring."""
    cpu_seconds: float
    """CPU time of this process so far."""


class Drawn(NamedTuple):
    """Trajectories that wait for their scores."""

    batch: TrajectoryBatch
    seconds: float
    """Wall time of drawing."""


class RolloutWorker:
    """Draws and scores batches; owns an environment, an oracle, a copy of the policy and a random generator."""

    def __init__(
        self,
        environment: SequenceEnvironment,
        oracle: Oracle,
        policy: nn.Module,
        config: ActorsConfig,
        *,
        seed: int,
        precision: torch.dtype = torch.float32,
    ):
        """`precision`: in which the policy's dense layers multiply."""
        self.environment, self.oracle, self.policy, self.config = environment, oracle, policy, config
        self._precision = precision
        self.version = 0
        self._weights = FlatParameters(policy)
        self._rng = np.random.default_rng(seed)

    def set_weights(self, weights: np.ndarray, version: int) -> None:
        """Take over the policy's parameters float32 [P]."""
        self._weights.load(weights)
        self.version = version

    def rollout(self) -> tuple[TrajectoryBatch, RolloutReport]:
        """`batch_size` on-policy trajectories, less the rejected ones."""
        return self.score(self.draw())

    def rollout_offline(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[TrajectoryBatch, RolloutReport]:
        """Push given sequences, `tokens` int [B, T] and `lengths` int [B], through the noise process, and score them."""
        return self.score(self.draw_offline(tokens, lengths))

    def draw(self) -> Drawn:
        """`batch_size` on-policy trajectories without scores."""
        return self._draw(self.config.batch_size, intended=None)

    def draw_offline(self, tokens: np.ndarray, lengths: np.ndarray) -> Drawn:
        """Given sequences after the noise process, without scores."""
        return self._draw(len(tokens), intended=self.environment.as_actions(tokens, lengths))

    def score(self, drawn: Drawn) -> tuple[TrajectoryBatch, RolloutReport]:
        """Have the trajectories scored and leave out the rejected ones; may run in a thread while others are drawn."""
        start = time.perf_counter()
        batch = drawn.batch
        batch.scores[:] = self._scores(batch)
        oracle_seconds = time.perf_counter() - start
        valid = valid_scores(batch.scores)
        if not valid.all():
            self._log_rejected(batch[~valid])
        report = RolloutReport(
            num_sampled=len(batch),
            num_rejected=int(len(batch) - valid.sum()),
            policy_version=int(batch.policy_version[0]) if len(batch) else OFFLINE_VERSION,
            rollout_seconds=drawn.seconds,
            oracle_seconds=oracle_seconds,
            cpu_seconds=time.process_time(),
        )
        return (batch if valid.all() else batch[valid]), report

    def state_dict(self) -> dict:
        """State of the random generator (JSON-able)."""
        return {"rng": self._rng.bit_generator.state, "version": self.version}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`."""
        self._rng.bit_generator.state = state["rng"]
        self.version = state["version"]

    def _draw(self, count: int, intended: np.ndarray | None) -> Drawn:
        seed = int(self._rng.integers(2**63))
        start = time.perf_counter()
        with autocast(self._precision, torch.device("cpu")):
            batch = self._trajectories(count, seed, intended)
        batch.policy_version[:] = self.version if intended is None else OFFLINE_VERSION
        batch.seed[:] = seed
        return Drawn(batch, time.perf_counter() - start)

    def _trajectories(self, count: int, seed: int, intended: np.ndarray | None) -> TrajectoryBatch:
        assert isinstance(self.policy, Policy)
        return draw_trajectories(
            self.policy,
            self.environment,
            self.environment.noise,
            count,
            np.random.default_rng(seed),
            temperature=self.config.temperature,
            epsilon=self.config.epsilon,
            intended=intended,
        )

    def _scores(self, batch: TrajectoryBatch) -> np.ndarray:
        """float32 [B]."""
        return self.oracle.score(batch.tokens, self.environment.lengths(batch.tokens, batch.num_steps))

    def _log_rejected(self, rejected: TrajectoryBatch) -> None:
        shown = rejected[:MAX_LOGGED_REJECTIONS]
        sequences = self.environment.sequences(shown.tokens, self.environment.lengths(shown.tokens, shown.num_steps))
        named = ", ".join(f"{s.decode()} ({v:g})" for s, v in zip(sequences, shown.scores, strict=True))
        logger.warning("rejected %d trajectories with NaN, infinite or negative score: %s", len(rejected), named)


@torch.no_grad()
def draw_trajectories(
    policy: Policy,
    environment: SequenceEnvironment,
    noise: NoiseSampler,
    count: int,
    rng: np.random.Generator,
    *,
    temperature: float = 1.0,
    epsilon: float = 0.0,
    intended: np.ndarray | None = None,
    context: Context | None = None,
) -> TrajectoryBatch:
    """`count` unscored trajectories (score NaN); each distinct prefix passes through the network once.

    `intended` int [count, T] replaces the policy's choices; the behaviour log-prob is then NaN. With a `context`, each
    trajectory continues its window. Policy version, seed and number of the window are left at 0 for the caller.
    """
    space = environment.space
    batch = empty_batch(space.max_length, count)
    batch.scores[:] = np.nan
    uniforms = rng.random((space.max_length, 2, count), dtype=np.float32)
    alive, state = np.arange(count), policy.start(context)
    groups = np.zeros(count, np.int64) if context is None else context.rows.cpu().numpy()
    for step in range(space.max_length):
        if intended is None:
            probabilities = behaviour(policy.at(state).log_policy, temperature, epsilon, space.allowed[step])
            actions, log_probs = _choose(probabilities, groups, uniforms[step, 0, : len(alive)])
            batch.log_behaviour[alive, step] = log_probs
        else:
            actions = intended[alive, step].astype(np.int64)
            batch.log_behaviour[alive, step] = np.nan
        tokens = noise.realise(step, actions, uniforms[step, 1, : len(alive)])
        batch.actions[alive, step], batch.tokens[alive, step] = actions, tokens
        batch.num_steps[alive] += 1
        if step + 1 == space.max_length:
            break
        if space.variable_length:
            going = tokens != space.end
            alive, groups, tokens, actions = alive[going], groups[going], tokens[going], actions[going]
            if not len(alive):
                break
        if intended is None:
            symbols = join_symbols(tokens, actions, space.num_actions, policy.thought_context)
            first, child = group_children(groups, symbols, num_symbols(space.num_actions, policy.thought_context))
            parents = torch.from_numpy(groups[first]).to(state.device)
            state = policy.extend(state, parents, torch.from_numpy(symbols[first]).to(state.device))
            groups = child
    return batch


def behaviour(log_policy: Tensor, temperature: float, epsilon: float, allowed: np.ndarray) -> np.ndarray:
    """float64 [N, A]: the policy at `temperature`, mixed with a share `epsilon` of the uniform one on `allowed` [A]."""
    probabilities = (log_policy / temperature).softmax(-1).double().cpu().numpy()
    return (1 - epsilon) * probabilities + epsilon * allowed / allowed.sum()


def _choose(probabilities: np.ndarray, groups: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Actions int64 [B] and their log-probs, from `probabilities` [N, A], the row of each, and one uniform each."""
    thresholds = np.cumsum(probabilities, 1)
    thresholds /= thresholds[:, -1:]
    thresholds[thresholds >= 1 - 1e-9] = np.inf  # rounding must not let an impossible last action through
    actions = (uniforms[:, None] >= thresholds[groups]).sum(1)
    return actions, np.log(probabilities[groups, actions])
