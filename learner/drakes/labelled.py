"""Sequences with their measured rewards, a tenth of them held out: what a reward model learns from.

Shapes: n sequences, L positions.
"""

from typing import Any

import numpy as np
import torch

from learner.strands import canonical

_MULTIPLIER, _MIX_A, _MIX_B = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)


def sequence_hash(tokens: np.ndarray) -> np.ndarray:
    """uint64 [n] of `tokens` int [n, L]: the same in every process; the mixer is SplitMix64 (Steele et al. 2014)."""
    state = np.zeros(len(tokens), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in tokens.T.astype(np.uint64):
            state = (state + column + np.uint64(1)) * _MULTIPLIER
            state = (state ^ (state >> np.uint64(30))) * _MIX_A
            state = (state ^ (state >> np.uint64(27))) * _MIX_B
            state = state ^ (state >> np.uint64(31))
    return state


def held_out(tokens: np.ndarray, share: float, *, rc_symmetric: bool) -> np.ndarray:
    """bool [n]: whether each of `tokens` int [n, L] belongs to the held-out `share` of all sequences.

    It depends on the sequence alone, with `rc_symmetric` on the canonical one, so that neither a repetition nor the other
    strand of a held-out sequence is ever trained on.
    """
    named = canonical(tokens) if rc_symmetric else tokens
    return sequence_hash(named) < np.uint64(min(share * 2.0**64, 2.0**64 - 2048))


class LabelledRing:
    """A ring of sequences and rewards; the oldest go first."""

    def __init__(self, capacity: int, length: int):
        self.tokens = np.zeros((capacity, length), dtype=np.uint8)
        self.rewards = np.zeros(capacity, dtype=np.float32)
        self.num_added = 0

    def __len__(self) -> int:
        return min(self.num_added, len(self.rewards))

    def add(self, tokens: np.ndarray, rewards: np.ndarray) -> None:
        """Store `tokens` int [n, L] with `rewards` float [n]; of more than fit, the last."""
        kept = slice(max(0, len(rewards) - len(self.rewards)), None)
        rows = (self.num_added + np.arange(len(rewards))[kept]) % len(self.rewards)
        self.tokens[rows], self.rewards[rows] = tokens[kept], rewards[kept]
        self.num_added += len(rewards)

    def recent(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The last `count` (or as many as there are), oldest first: tokens uint8 [n, L], rewards float32 [n]."""
        rows = (self.num_added - min(count, len(self)) + np.arange(min(count, len(self)))) % len(self.rewards)
        return self.tokens[rows], self.rewards[rows]

    def rows(self, size: tuple[int, ...], rng: np.random.Generator, *, recent: int, recent_share: float) -> np.ndarray:
        """Row numbers int64 [*size], drawn with replacement.

        The first `recent_share` of the last dimension is drawn from the `recent` newest rows, the rest from all.
        """
        age = rng.integers(len(self), size=size)
        num_recent = round(size[-1] * recent_share)
        age[..., :num_recent] = rng.integers(min(recent, len(self)), size=(*size[:-1], num_recent))
        return (self.num_added - 1 - age) % len(self.rewards)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs: copies, as tensors."""
        count = len(self)
        return {
            "tokens": torch.from_numpy(self.tokens[:count].copy()),
            "rewards": torch.from_numpy(self.rewards[:count].copy()),
            "num_added": self.num_added,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a saved ring of the same capacity and length; else ValueError."""
        count = min(int(state["num_added"]), len(self.rewards))
        if tuple(state["tokens"].shape) != (count, self.tokens.shape[1]):
            raise ValueError("the saved labels belong to another capacity or length of sequences")
        self.tokens[:count], self.rewards[:count] = state["tokens"].numpy(), state["rewards"].numpy()
        self.num_added = int(state["num_added"])
