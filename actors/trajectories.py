"""Trajectories as a few arrays. Shapes: B trajectories, T steps."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

OFFLINE_VERSION = -1
"""Policy version of trajectories whose intended actions came from a data set."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryBatch:
    """B trajectories of up to T steps; entries at or beyond `num_steps` are zero."""

    tokens: np.ndarray
    """int16 [B, T]: what the environment realised."""
    actions: np.ndarray
    """int16 [B, T]: what the policy intended."""
    num_steps: np.ndarray
    """int16 [B]: steps taken, the end token's included."""
    scores: np.ndarray
    """float32 [B]: the oracle's raw score, never a transformed reward."""
    log_behaviour: np.ndarray
    """float32 [B, T]: log-prob of each intended action under the policy that drew it, temperature and exploration
    included; NaN for offline trajectories. The environment's noise is not part of it."""
    policy_version: np.ndarray
    """int64 [B]: version of the weights that drew it; `OFFLINE_VERSION` for offline trajectories."""
    seed: np.ndarray
    """int64 [B]: seed of the rollout call that drew it."""
    contexts: np.ndarray
    """int32 [B]: number of the window that it continues (generator.name forecast); 0 where there is none."""

    def __post_init__(self):
        for field in fields(self):
            assert len(getattr(self, field.name)) == len(self.scores), (
                f"{field.name} does not fit {len(self.scores)} rows"
            )

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: slice | np.ndarray) -> "TrajectoryBatch":
        """The trajectories at `rows`: a slice, or an index or boolean array."""
        return TrajectoryBatch(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def arrays(self) -> dict[str, np.ndarray]:
        """Name of each array -> array."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def concatenate(batches: Sequence[TrajectoryBatch]) -> TrajectoryBatch:
    """One batch of all trajectories, in order."""
    if len(batches) == 1:
        return batches[0]
    names = [field.name for field in fields(TrajectoryBatch)]
    return TrajectoryBatch(**{name: np.concatenate([getattr(batch, name) for batch in batches]) for name in names})


def empty_batch(num_steps: int, size: int = 0) -> TrajectoryBatch:
    """`size` zero-filled trajectories of up to `num_steps` steps."""
    return TrajectoryBatch(
        tokens=np.zeros((size, num_steps), np.int16),
        actions=np.zeros((size, num_steps), np.int16),
        num_steps=np.zeros(size, np.int16),
        scores=np.zeros(size, np.float32),
        log_behaviour=np.zeros((size, num_steps), np.float32),
        policy_version=np.zeros(size, np.int64),
        seed=np.zeros(size, np.int64),
        contexts=np.zeros(size, np.int32),
    )


def mix(batches: Sequence[TrajectoryBatch]) -> TrajectoryBatch:
    """One batch in which the trajectories of each given batch are evenly spread, so that its slices keep the shares."""
    if len(batches) == 1:
        return batches[0]
    places = np.concatenate([(np.arange(len(batch)) + 0.5) / max(1, len(batch)) for batch in batches])
    return concatenate(batches)[np.argsort(places, kind="stable")]


def trajectories_of(tokens: np.ndarray) -> TrajectoryBatch:
    """Given sequences int [B, L], without reveal steps (0) and log-probs (NaN)."""
    batch = empty_batch(tokens.shape[1], len(tokens))
    batch.tokens[:], batch.num_steps[:] = tokens, tokens.shape[1]
    batch.scores[:] = batch.log_behaviour[:] = np.nan
    return batch
