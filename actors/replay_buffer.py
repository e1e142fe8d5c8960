"""The replay buffer: rings of trajectory arrays, shared by all rollout actors.

It stores intended and realised tokens, the raw score, and the log-prob of the *behaviour* policy at drawing time (see
`TrajectoryBatch`); the balance objectives need no importance weights, so no log-prob of a later policy is ever stored.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from actors.memory_bank import MemoryBankConfig
from actors.motif_law import MotifLawConfig
from actors.trajectories import TrajectoryBatch, concatenate, empty_batch
from learner.archives import read_archive, write_archive
from learner.configs import AbsolutePath, StrictConfig

FORMAT_VERSION = 3
STATE_BYTES = 64 << 20
"""Most room for what a saved buffer holds besides its trajectories."""


class ReplayConfig(StrictConfig):
    """What is stored, and what the learner gets besides fresh trajectories."""

    capacity: int = Field(200_000, ge=1, le=1_000_000_000)
    """Trajectories kept; the oldest go first. Offline trajectories are kept beside them and never evicted."""
    replay_share: float = Field(0.0, ge=0, lt=1)
    """Share of the policy's batches that is replayed."""
    offline_share: float = Field(0.0, ge=0, lt=1)
    """Share of the policy's batches that comes from the offline data."""
    priority_exponent: float = Field(0.0, ge=0, le=100)
    """Policy replay draws trajectories in proportion to score^this; 0: uniformly. Dynamics replay is uniform."""
    offline_source: Literal["none", "lower_half", "file", "motif_law"] = "none"
    """Sequences pushed through the noise process before the run: the lower half of the oracle's scores, a file, or draws
    of a synthetic law of regulatory DNA."""
    offline_path: AbsolutePath | None = None
    """offline_source file: CSV with a column `sequence`, or FASTA (.fa, .fasta, .fna, .faa); their noisy versions are scored
    by the oracle."""
    offline_size: int = Field(10_000, ge=1, le=100_000_000)
    """Most offline trajectories; drawn at random from the source if it has more."""
    motif_law: MotifLawConfig = MotifLawConfig()
    """offline_source motif_law: what is drawn, whose probabilities are known exactly."""
    bank: MemoryBankConfig = MemoryBankConfig()
    """Sequences that scored well, kept beside the trajectories (generator.name drakes)."""

    @model_validator(mode="after")
    def _consistent(self) -> "ReplayConfig":
        if self.replay_share + self.offline_share >= 1:
            raise ValueError("replay_share + offline_share must stay below 1: fresh trajectories are needed")
        if self.offline_share > 0 and self.offline_source == "none":
            raise ValueError("offline_share > 0 needs an offline_source: lower_half, file or motif_law")
        if (self.offline_source == "file") != (self.offline_path is not None):
            raise ValueError("offline_path goes with offline_source: file")
        return self


class SavedBufferError(ValueError):
    """A saved buffer that cannot be used; the message says why."""


class Draw(NamedTuple):
    """Replayed trajectories for one call of the learner."""

    policy: TrajectoryBatch | None
    """Replayed and offline ones that join the fresh ones, or None."""
    dynamics: TrajectoryBatch | None
    """Those that train the dynamics model, or None if nothing is stored."""
    banked: TrajectoryBatch | None = None
    """Members of a memory bank, or None."""


class TrajectoryRing:
    """A fixed number of rows in arrays allocated once; new rows overwrite the oldest."""

    def __init__(self, capacity: int, num_steps: int):
        self.arrays = empty_batch(num_steps, capacity).arrays()
        self.capacity, self.num_added = capacity, 0

    def __len__(self) -> int:
        return min(self.num_added, self.capacity)

    def add(self, batch: TrajectoryBatch) -> None:
        """Store `batch`; of a batch larger than the ring, the last rows."""
        kept = batch[max(0, len(batch) - self.capacity) :]
        rows = (self.num_added + len(batch) - len(kept) + np.arange(len(kept))) % self.capacity
        for name, array in kept.arrays().items():
            self.arrays[name][rows] = array
        self.num_added += len(batch)

    def rows(self, index: np.ndarray | slice) -> TrajectoryBatch:
        """A copy of the rows at `index`."""
        return TrajectoryBatch(**{name: np.array(array[index]) for name, array in self.arrays.items()})


class ReplayBuffer:
    """Rings of online and of offline trajectories, deduplication of resent batches, sampling, statistics."""

    def __init__(
        self, config: ReplayConfig, num_steps: int, *, seed: int, num_actions: int = 2**15, num_contexts: int = 2**31
    ):
        """`num_steps`, `num_actions`, `num_contexts`: of the environment; saved trajectories with others are refused."""
        self.config, self._num_steps, self._num_actions = config, num_steps, num_actions
        self._num_contexts = num_contexts
        self._online = TrajectoryRing(config.capacity, num_steps)
        self._offline = TrajectoryRing(1, num_steps)
        self._powers = np.zeros(config.capacity if config.priority_exponent else 0)
        self._known_priorities, self._priority_scale = 0, np.nan
        self._rng = np.random.default_rng(seed)
        self._last_number: dict[str, int] = {}
        self.num_duplicates = 0

    def __len__(self) -> int:
        return len(self._online)

    @property
    def num_added(self) -> int:
        """Online trajectories accepted so far, evicted ones included."""
        return self._online.num_added

    def add(self, batch: TrajectoryBatch, source: str, number: int) -> int:
        """Store the `number`-th batch of `source`; returns the trajectories accepted: 0 if that batch came before."""
        if number <= self._last_number.get(source, -1):
            self.num_duplicates += len(batch)
            return 0
        self._last_number[source] = number
        self._online.add(batch)
        return len(batch)

    def set_offline(self, batch: TrajectoryBatch) -> None:
        """Replace the offline trajectories."""
        self._offline = TrajectoryRing(max(1, len(batch)), self._num_steps)
        self._offline.add(batch)

    @property
    def num_offline(self) -> int:
        """Offline trajectories stored."""
        return len(self._offline)

    def sample(self, count: int, *, prioritised: bool = False) -> TrajectoryBatch:
        """`count` online trajectories with replacement: uniformly, or in proportion to score^priority_exponent.

        Raises ValueError if nothing is stored.
        """
        if not len(self._online):
            raise ValueError("the replay buffer is empty")
        if not (prioritised and self.config.priority_exponent):
            return self._online.rows(self._rng.integers(len(self._online), size=count))
        if self._online.arrays["scores"][: len(self._online)].max() <= 0:
            return self._online.rows(self._rng.integers(len(self._online), size=count))
        cumulated = np.cumsum(self._priorities())
        picked = np.searchsorted(cumulated, self._rng.random(count) * cumulated[-1], side="right")
        return self._online.rows(np.minimum(picked, len(self._online) - 1))

    def _priorities(self) -> np.ndarray:
        """float64 [n]: (score / largest score)^priority_exponent of every row; computed for rows added since the last call."""
        ring, scores = self._online, self._online.arrays["scores"][: len(self._online)]
        largest = float(scores.max())
        known = self._known_priorities if largest == self._priority_scale else 0
        num_new = min(ring.num_added - known, len(ring))
        rows = (ring.num_added - num_new + np.arange(num_new)) % ring.capacity
        self._powers[rows] = (scores[rows].astype(np.float64) / largest) ** self.config.priority_exponent
        self._known_priorities, self._priority_scale = ring.num_added, largest
        return self._powers[: len(ring)]

    def sample_offline(self, count: int) -> TrajectoryBatch:
        """`count` offline trajectories, uniformly with replacement."""
        return self._offline.rows(self._rng.integers(len(self._offline), size=count))

    def draw(self, num_fresh: int, num_dynamics: int) -> Draw:
        """What the learner needs besides `num_fresh` fresh trajectories: the configured shares, and `num_dynamics`.

        The shares hold for the policy's batch as a whole; offline trajectories train the dynamics model too, in
        proportion to their share.
        """
        replay, offline = self.config.replay_share, self.config.offline_share
        total = num_fresh / (1 - replay - offline)
        num_replayed = round(total * replay) if len(self) else 0
        num_offline = round(total * offline) if self.num_offline else 0
        parts = [self.sample(num_replayed, prioritised=True)] if num_replayed else []
        parts += [self.sample_offline(num_offline)] if num_offline else []
        dynamics_offline = round(num_dynamics * offline) if self.num_offline else 0
        dynamics = [self.sample(num_dynamics - dynamics_offline)] if len(self) and num_dynamics else []
        dynamics += [self.sample_offline(dynamics_offline)] if dynamics_offline else []
        return Draw(concatenate(parts) if parts else None, _shuffled(dynamics, self._rng) if dynamics else None)

    def statistics(self) -> dict[str, float]:
        """Size, counts and score statistics of what is stored."""
        scores = self._online.arrays["scores"][: len(self)]
        versions = self._online.arrays["policy_version"][: len(self)]
        filled = (
            {"buffer_mean_score": float(scores.mean()), "buffer_max_score": float(scores.max())} if len(self) else {}
        )
        return {
            "buffer_size": len(self),
            "buffer_num_added": self.num_added,
            "buffer_num_duplicates": self.num_duplicates,
            "buffer_num_offline": self.num_offline,
            "buffer_oldest_version": int(versions.min()) if len(self) else 0,
            **filled,
        }

    def save(self, path: Path) -> None:
        """Write everything so that `path` is whole or absent."""
        state = {
            "format_version": FORMAT_VERSION,
            "num_added": self.num_added,
            "num_duplicates": self.num_duplicates,
            "num_offline": self.num_offline,
            "last_number": self._last_number,
            "rng": self._rng.bit_generator.state,
        }
        arrays = {f"online_{name}": array[: len(self)] for name, array in self._online.arrays.items()}
        arrays |= {f"offline_{name}": array[: self.num_offline] for name, array in self._offline.arrays.items()}
        write_archive(path, state, arrays)

    def load(self, path: Path) -> None:
        """Continue from a saved buffer of the same capacity and length of sequences.

        Raises SavedBufferError if the file is missing, damaged or does not fit.
        """
        try:
            state, saved = read_archive(path, self._largest_file())
            if state["format_version"] != FORMAT_VERSION:
                raise SavedBufferError(
                    f"{path}: format version {state['format_version']}, this program reads version {FORMAT_VERSION}"
                )
            online, offline = _batch(saved, "online_"), _batch(saved, "offline_")
            capacity = self.config.capacity
            if online.tokens.shape[1] != self._num_steps or len(online) != min(state["num_added"], capacity):
                raise SavedBufferError(f"{path}: was saved with another replay.capacity or environment.length")
            self._check_rows(online)
            self._check_rows(offline)
            _check_counts(state["num_added"], state["num_duplicates"], *state["last_number"].values())
            rng = np.random.default_rng(0)
            rng.bit_generator.state = state["rng"]
        except SavedBufferError:
            raise
        except Exception as error:  # numpy raises many types for damaged files
            raise SavedBufferError(f"{path}: damaged, cut short or not a saved replay buffer ({error})") from error
        self._online = TrajectoryRing(capacity, self._num_steps)
        for name, array in online.arrays().items():
            self._online.arrays[name][: len(online)] = array
        self._online.num_added = state["num_added"]
        self._priority_scale = np.nan
        self._offline = TrajectoryRing(1, self._num_steps)
        if len(offline):
            self.set_offline(offline)
        self.num_duplicates, self._last_number = state["num_duplicates"], state["last_number"]
        self._rng = rng

    def _largest_file(self) -> int:
        rows = self.config.capacity + self.config.offline_size
        return rows * trajectory_bytes(self._num_steps) + STATE_BYTES

    def _check_rows(self, batch: TrajectoryBatch) -> None:
        """Raises ValueError for arrays of another form, and for values that would lead outside of another array."""
        for name, expected in empty_batch(self._num_steps).arrays().items():
            array = getattr(batch, name)
            if array.dtype != expected.dtype or array.shape[1:] != expected.shape[1:]:
                raise ValueError(
                    f"{name}: {array.dtype} {array.shape}; allowed: {expected.dtype} {expected.shape[1:]} a row"
                )
        for name, low, high in (
            ("tokens", 0, self._num_actions - 1), ("actions", 0, self._num_actions - 1), ("num_steps", 1, self._num_steps),
            ("contexts", 0, self._num_contexts - 1),
        ):  # fmt: skip
            array = getattr(batch, name)
            if len(batch) and not (low <= array.min() and array.max() <= high):
                raise ValueError(f"{name}: from {array.min()} to {array.max()}; allowed: {low} to {high}")
        if not (np.isfinite(batch.scores) & (batch.scores >= 0)).all():
            raise ValueError("scores: allowed are finite numbers >= 0")


def trajectory_bytes(num_steps: int) -> int:
    """Memory of a stored trajectory."""
    return sum(array.nbytes for array in empty_batch(num_steps, 1).arrays().values())


def _check_counts(*counts: Any) -> None:
    for count in counts:
        if type(count) is not int or not 0 <= count < 2**63:
            raise ValueError(f"got {str(count)[:40]!r}; allowed: a count")


def _batch(saved: Mapping[str, np.ndarray], prefix: str) -> TrajectoryBatch:
    return TrajectoryBatch(**{field.name: saved[prefix + field.name] for field in fields(TrajectoryBatch)})


def _shuffled(parts: list[TrajectoryBatch], rng: np.random.Generator) -> TrajectoryBatch:
    whole = concatenate(parts)
    return whole if len(parts) == 1 else whole[rng.permutation(len(whole))]
