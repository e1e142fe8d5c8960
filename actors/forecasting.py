"""The rollout worker of forecasts: draws paths that continue training windows, and has them scored."""

import numpy as np
import torch

from actors.environments.noise import NoiseSampler
from actors.environments.sequence import SequenceEnvironment
from actors.environments.time_series import PathScorer
from actors.rollout import ActorsConfig, RolloutWorker, draw_trajectories
from actors.trajectories import TrajectoryBatch
from learner.networks.context import Context
from learner.policy import Policy


class ForecastWorker(RolloutWorker):
    """A rollout worker whose trajectories continue windows of a series, `paths_per_window` each."""

    def __init__(
        self, environment: SequenceEnvironment, scorer: PathScorer, policy: Policy, config: ActorsConfig,
        *, paths_per_window: int, seed: int, precision: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__(environment, scorer, policy, config, seed=seed, precision=precision)
        self._inputs, self._paths_per_window = scorer.task.split("train").inputs, paths_per_window

    def _trajectories(self, count: int, seed: int, intended: np.ndarray | None) -> TrajectoryBatch:
        assert isinstance(self.policy, Policy)
        assert intended is None, "forecasts have no offline trajectories"
        rng = np.random.default_rng(seed)
        num_windows = min(len(self._inputs), -(-count // self._paths_per_window))
        chosen = rng.choice(len(self._inputs), num_windows, replace=False)
        index = np.arange(count) % num_windows
        batch = draw_paths(
            self.policy, self.environment, self.environment.noise, self._inputs[chosen], index, rng,
            temperature=self.config.temperature, epsilon=self.config.epsilon,
        )  # fmt: skip
        batch.contexts[:] = chosen[index]
        return batch

    def _scores(self, batch: TrajectoryBatch) -> np.ndarray:
        return self.oracle.score(np.column_stack([batch.contexts, batch.tokens]), batch.num_steps)


def draw_paths(
    policy: Policy,
    environment: SequenceEnvironment,
    noise: NoiseSampler,
    inputs: np.ndarray,
    index: np.ndarray,
    rng: np.random.Generator,
    *,
    temperature: float = 1.0,
    epsilon: float = 0.0,
) -> TrajectoryBatch:
    """Unscored paths that continue the windows `inputs` float32 [n, W, F] at `index` int [B]; `contexts` are left at 0."""
    context = Context(torch.from_numpy(inputs), torch.from_numpy(index.astype(np.int64)))
    return draw_trajectories(
        policy, environment, noise, len(index), rng, temperature=temperature, epsilon=epsilon, context=context
    )
