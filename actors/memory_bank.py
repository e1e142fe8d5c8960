"""The memory bank: sequences whose oracle reward beat the mean of the recent past when they came.

Rewards are always the oracle's, never a model's. Shapes: B sequences of a batch, N members, L positions.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from learner.archives import DAMAGE, read_archive, write_archive
from learner.configs import StrictConfig
from learner.strands import canonical, reverse_complement

FORMAT_VERSION = 1
STATE_BYTES = 1 << 20
"""Most room for what a saved bank holds besides its members."""


class MemoryBankConfig(StrictConfig):
    """What the bank admits and keeps."""

    capacity: int = Field(5000, ge=1, le=10_000_000)
    """Members kept; the lowest reward goes first, of equal ones the oldest member."""
    window: int = Field(1000, ge=1, le=1_000_000)
    """Latest oracle rewards whose mean a newcomer must beat."""
    rc_symmetric: bool = True
    """Whether both strands count as one sequence; false for strand-specific rewards and for alphabets other than ACGT."""
    niche_distance: int = Field(0, ge=0)
    """Members differ in at least this many positions (from each other's reverse complement too): a newcomer closer than
    that replaces those it is close to if it is better than all of them. 0 and 1: no such rule."""
    temperature: float = Field(0.1, gt=0)
    """T_b of the draws, with weights exp(reward / T_b) (units of the reward)."""


class SavedBankError(ValueError):
    """A saved bank that cannot be used; the message names the file and says why."""


class BankMembers(NamedTuple):
    """Copies of members."""

    tokens: np.ndarray
    """uint8 [N, L]."""
    rewards: np.ndarray
    """float32 [N]."""


class MemoryBank:
    """Admission, duplicates, eviction, draws."""

    def __init__(self, config: MemoryBankConfig, length: int, *, seed: int):
        self.config, self.length = config, length
        self.num_admitted = self.num_updated = self.num_invalid = 0
        self._tokens = np.zeros((config.capacity, length), dtype=np.uint8)
        self._rewards = np.zeros(config.capacity, dtype=np.float32)
        self._numbers = np.zeros(config.capacity, dtype=np.int64)
        self._rows: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._window = np.zeros(0, dtype=np.float32)
        self._rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def threshold(self) -> float:
        """Mean of the window, which a newcomer must exceed; minus infinity while it is empty."""
        return float(self._window.mean(dtype=np.float64)) if len(self._window) else -np.inf

    def add(self, tokens: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """Show `tokens` int [B, L] with oracle `rewards` float [B], one after the other; bool [B]: admitted as new.

        Each is compared with the window before its own reward joins it. A sequence that is a member already takes its new
        reward, whatever the threshold. Rewards that are not finite are counted and otherwise ignored.
        """
        rewards = np.asarray(rewards, dtype=np.float32)
        valid = np.flatnonzero(np.isfinite(rewards))
        self.num_invalid += len(rewards) - len(valid)
        tokens = np.asarray(tokens, dtype=np.uint8)
        beats = self._pass_window(rewards[valid])
        keys = canonical(tokens[valid]) if self.config.rc_symmetric else tokens[valid]
        admitted = np.zeros(len(rewards), dtype=bool)
        for row, beat, key in zip(valid, beats, map(bytes, keys), strict=True):
            if key in self._rows:
                self._rewards[self._rows[key]] = rewards[row]
                self.num_updated += 1
            elif beat:
                admitted[row] = self._admit(tokens[row], rewards[row], key)
        return admitted

    def _pass_window(self, rewards: np.ndarray) -> np.ndarray:
        """bool [B]: which of `rewards` float32 [B] beat the mean of those before; all join the window.

        Sums and products are those of float32 numbers in float64, so that rewards equal to the mean do not pass by
        rounding.
        """
        past = np.concatenate([self._window, rewards]).astype(np.float64)
        sums = np.concatenate([[0.0], np.cumsum(past)])
        ends = len(self._window) + np.arange(len(rewards))
        starts = np.maximum(0, ends - self.config.window)
        self._window = past[-self.config.window :].astype(np.float32)
        return (ends == 0) | (rewards.astype(np.float64) * (ends - starts) > sums[ends] - sums[starts])

    def _admit(self, tokens: np.ndarray, reward: np.float32, key: bytes) -> bool:
        near = self._near(tokens)
        if len(near) and reward <= self._rewards[near].max():
            return False
        for row in near[::-1]:  # from the last one, because removing a row moves the last into its place
            self._remove(int(row))
        if len(self) == self.config.capacity:
            worst = self._worst()
            if reward < self._rewards[worst]:
                return False
            self._remove(worst)
        row = len(self)
        self._tokens[row], self._rewards[row], self._numbers[row] = tokens, reward, self.num_admitted
        self._rows[key] = row
        self._keys.append(key)
        self.num_admitted += 1
        return True

    def _near(self, tokens: np.ndarray) -> np.ndarray:
        """Ascending rows int64 of the members within the niche distance of `tokens` [L]."""
        if self.config.niche_distance < 2:
            return np.zeros(0, dtype=np.int64)
        members = self._tokens[: len(self)]
        distance = (members != tokens).sum(1)
        if self.config.rc_symmetric:
            distance = np.minimum(distance, (members != reverse_complement(tokens)).sum(1))
        return np.flatnonzero(distance < self.config.niche_distance)

    def _worst(self) -> int:
        lowest = np.flatnonzero(self._rewards[: len(self)] == self._rewards[: len(self)].min())
        return int(lowest[self._numbers[lowest].argmin()])

    def _remove(self, row: int) -> None:
        last = len(self) - 1
        del self._rows[self._keys[row]]
        if row != last:
            for array in (self._tokens, self._rewards, self._numbers):
                array[row] = array[last]
            self._keys[row] = self._keys[last]
            self._rows[self._keys[row]] = row
        self._keys.pop()

    def sample(self, count: int) -> BankMembers:
        """`count` members with replacement, in proportion to exp(reward / T_b), of those that beat the threshold now.

        None at all if no member does: the window moves on, and members may fall behind it.
        """
        rewards = self._rewards[: len(self)].astype(np.float64)
        eligible = np.flatnonzero(rewards > self.threshold)
        if not len(eligible):
            return self._members(eligible)
        weights = np.exp((rewards[eligible] - rewards[eligible].max()) / self.config.temperature)
        return self._members(self._rng.choice(eligible, size=count, p=weights / weights.sum()))

    def all(self) -> BankMembers:
        """Every member, highest reward first, of equal ones the oldest first."""
        return self._members(np.lexsort((self._numbers[: len(self)], -self._rewards[: len(self)])))

    def _members(self, rows: np.ndarray) -> BankMembers:
        return BankMembers(self._tokens[rows], self._rewards[rows])

    def statistics(self) -> dict[str, float]:
        """Size, counts, threshold and rewards of the bank."""
        rewards = self._rewards[: len(self)]
        filled = (
            {"bank_mean_reward": float(rewards.mean()), "bank_max_reward": float(rewards.max())} if len(self) else {}
        )
        return {
            "bank_size": len(self),
            "bank_num_admitted": self.num_admitted,
            "bank_num_updated": self.num_updated,
            "bank_num_invalid": self.num_invalid,
            **({"bank_threshold": self.threshold} if len(self._window) else {}),
            **filled,
        }

    def save(self, path: Path) -> None:
        """Write everything so that `path` is whole or absent."""
        state = {
            "format_version": FORMAT_VERSION,
            "config": self.config.model_dump(),
            "length": self.length,
            "num_admitted": self.num_admitted,
            "num_updated": self.num_updated,
            "num_invalid": self.num_invalid,
            "rng": self._rng.bit_generator.state,
        }
        count = len(self)
        arrays: dict[str, np.ndarray] = {
            "tokens": self._tokens[:count],
            "rewards": self._rewards[:count],
            "numbers": self._numbers[:count],
            "window": self._window,
        }
        write_archive(path, state, arrays)

    def load(self, path: Path) -> None:
        """Continue from a saved bank of the same configuration and length of sequences.

        Raises SavedBankError if the file is missing, damaged or does not fit.
        """
        try:
            state, saved = read_archive(
                path, self.config.capacity * (self.length + 16) + 4 * self.config.window + STATE_BYTES
            )
            tokens, rewards, numbers, window = (saved[name] for name in ("tokens", "rewards", "numbers", "window"))
            version, config, length = state["format_version"], state["config"], state["length"]
            counts = [int(state[name]) for name in ("num_admitted", "num_updated", "num_invalid")]
            rng = np.random.default_rng()
            rng.bit_generator.state = state["rng"]
        except DAMAGE as error:
            raise SavedBankError(f"{path}: damaged, cut short or not a saved memory bank ({error})") from error
        if version != FORMAT_VERSION:
            raise SavedBankError(f"{path}: format version {version}, this program reads version {FORMAT_VERSION}")
        self._check_fits(path, config, length)
        if tokens.shape != (len(rewards), self.length) or not len(numbers) == len(rewards) <= self.config.capacity:
            raise SavedBankError(f"{path}: damaged, cut short or not a saved memory bank (arrays of unequal size)")
        count = len(rewards)
        self._tokens[:count], self._rewards[:count], self._numbers[:count] = tokens, rewards, numbers
        self._keys = [bytes(key) for key in (canonical(tokens) if self.config.rc_symmetric else tokens)]
        self._rows = {key: row for row, key in enumerate(self._keys)}
        self._window, self._rng = window.astype(np.float32), rng
        self.num_admitted, self.num_updated, self.num_invalid = counts

    def _check_fits(self, path: Path, config: dict[str, Any], length: int) -> None:
        differing = [name for name, value in self.config.model_dump().items() if config.get(name) != value]
        if length != self.length:
            differing.append("length of sequences")
        if differing:
            raise SavedBankError(f"{path}: was saved with another {', '.join(differing)}")
