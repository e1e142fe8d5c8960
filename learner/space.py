"""The set of sequences that can be generated, and its tree of prefixes.

Shapes: V tokens of the alphabet, A actions (V, plus one end token when lengths vary), T largest number of steps.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, kw_only=True)
class SequenceSpace:
    """All sequences over `num_tokens` tokens, of length `max_length`, or of `min_length..max_length` with an end token.

    A sequence that reaches `max_length` ends by itself; a shorter one ends with the token `end` (index V).
    """

    num_tokens: int
    max_length: int
    variable_length: bool = False
    min_length: int = 1

    def __post_init__(self):
        if self.num_tokens < 2 or self.max_length < 1:
            raise ValueError(f"a space needs num_tokens >= 2 and max_length >= 1, got {self}")
        if self.variable_length and not 0 <= self.min_length <= self.max_length:
            raise ValueError(f"min_length must lie in 0..{self.max_length}, got {self.min_length}")

    @property
    def num_actions(self) -> int:
        """A."""
        return self.num_tokens + int(self.variable_length)

    @property
    def end(self) -> int:
        """Index of the end token; equals A - 1 when lengths vary, and is never realised otherwise."""
        return self.num_tokens

    @cached_property
    def allowed(self) -> np.ndarray:
        """bool [T, A]: the actions, and outcomes, possible at each step (no end before `min_length`)."""
        allowed = np.ones((self.max_length, self.num_actions), dtype=bool)
        if self.variable_length:
            allowed[: self.min_length, self.end] = False
        return allowed

    def _ends_at(self, length: int) -> bool:
        """Whether finished sequences of this length exist."""
        return length == self.max_length or (self.variable_length and self.min_length <= length)

    @cached_property
    def num_sequences(self) -> int:
        """Number of distinct finished sequences (exact, unbounded integer)."""
        return sum(self.num_tokens**length for length in range(self.max_length + 1) if self._ends_at(length))

    @cached_property
    def log_num_completions(self) -> np.ndarray:
        """float32 [T+1]: log of the number of finished sequences below a prefix of each length."""
        log_counts = [0.0]
        for length in range(self.max_length - 1, -1, -1):
            below = log_counts[0] + np.log(self.num_tokens)
            log_counts.insert(0, float(np.logaddexp(below, 0.0)) if self._ends_at(length) else below)
        return np.asarray(log_counts, dtype=np.float32)

    def enumerate(self) -> tuple[np.ndarray, np.ndarray]:
        """All finished sequences, shorter first, then in lexicographic order.

        Returns `tokens` int16 [n, T] (zero beyond the end) and `lengths` int16 [n].
        """
        blocks, lengths = [], []
        for length in range(self.max_length + 1):
            if not self._ends_at(length):
                continue
            codes = np.arange(self.num_tokens**length)
            block = np.zeros((len(codes), self.max_length), dtype=np.int16)
            for position in range(length):
                block[:, position] = codes // self.num_tokens ** (length - 1 - position) % self.num_tokens
            blocks.append(block)
            lengths.append(np.full(len(codes), length, dtype=np.int16))
        return np.concatenate(blocks), np.concatenate(lengths)
