"""The rollout worker of masked diffusion: draws sequences by ancestral sampling and has them scored."""

import numpy as np
import torch

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import Oracle
from actors.rollout import ActorsConfig, RolloutWorker
from actors.trajectories import TrajectoryBatch, trajectories_of
from learner.drakes.denoiser import Denoiser
from learner.drakes.filters import FilterConfig
from learner.drakes.fine_tuning import RolloutConfig
from learner.drakes.sampling import Samples, sample
from learner.drakes.schedule import SCHEDULES


class DenoisingWorker(RolloutWorker):
    """A rollout worker whose sequences come from a denoiser, revealed in any order; there is no noise.

    In its trajectories, `actions` are the reveal steps, and `log_behaviour` belongs to each position's token.
    """

    def __init__(
        self,
        environment: SequenceEnvironment,
        oracle: Oracle,
        denoiser: Denoiser,
        config: ActorsConfig,
        sampling: RolloutConfig,
        *,
        seed: int,
    ):
        super().__init__(environment, oracle, denoiser, config, seed=seed)
        self._denoiser, self._sampling = denoiser, sampling

    def _trajectories(self, count: int, seed: int, intended: np.ndarray | None) -> TrajectoryBatch:
        if intended is not None:  # given sequences
            return trajectories_of(intended)
        filters = FilterConfig(temperature=self.config.temperature)
        return draw_sequences(self._denoiser, count, self._sampling, seed=seed, filters=filters)


def draw_sequences(
    denoiser: Denoiser,
    count: int,
    sampling: RolloutConfig,
    *,
    seed: int,
    filters: FilterConfig | None = None,
    template: torch.Tensor | None = None,
) -> TrajectoryBatch:
    """`count` unscored sequences; `template` int64 [L] says which positions are given, see `sampling.sample`."""
    drawn = sample(
        denoiser,
        count,
        num_steps=sampling.num_steps,
        filters=filters or FilterConfig(),
        template=template,
        schedule=SCHEDULES[sampling.schedule],
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
    return _as_batch(drawn)


def _as_batch(drawn: Samples) -> TrajectoryBatch:
    batch = trajectories_of(drawn.tokens.numpy())
    batch.actions[:], batch.log_behaviour[:] = drawn.reveal_steps.numpy(), drawn.log_probs.numpy()
    return batch
