"""What networks over prefixes have in common: the symbols they read, their states, and the index of distinct prefixes.

Shapes: B sequences, T steps, N distinct prefixes, A actions, O outputs, S symbols (A, or A² with a thought context).
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from learner.networks.context import Context


class PrefixState(Protocol):
    """N prefixes of one depth, in the form that a network extends symbol by symbol."""

    @property
    def depth(self) -> int:
        """Symbols so far."""

    @property
    def device(self) -> torch.device:
        """Where the state lives."""

    def __len__(self) -> int:
        """N."""

    def select(self, rows: slice) -> Self:
        """Some of the prefixes."""


class PrefixNetwork(nn.Module, ABC):
    """Outputs [.., O] for prefixes; `thought_context` says whether the symbols are pairs (realised, intended)."""

    thought_context: bool = False
    reads_windows: bool = False
    """Whether outputs depend on a `Context`, which must then be given; others are given it too, and pass it over."""
    head: nn.Linear
    """The last layer, which starts at zero."""

    @abstractmethod
    def forward(self, symbols: Tensor, rows: Tensor, context: Context | None = None) -> Tensor:
        """Outputs [N, O] of the prefixes at flat positions `rows` int64 [N] (b*(T+1) + t) of `symbols` int64 [B, T]."""

    @abstractmethod
    def start(self, context: Context | None = None) -> Any:
        """The `PrefixState` of the root, or of the root of each window."""

    @abstractmethod
    def extend(self, state: Any, parents: Tensor, symbols: Tensor) -> Any:
        """The prefixes `parents[i]` int64 [N'] of `state` followed by `symbols[i]` int64 [N']."""

    @abstractmethod
    def outputs(self, state: Any) -> Tensor:
        """[N, O]; equal to `forward` on the same prefixes."""


def num_symbols(num_actions: int, thought_context: bool) -> int:
    """S."""
    return num_actions**2 if thought_context else num_actions


def join_symbols(tokens: np.ndarray, actions: np.ndarray, num_actions: int, thought_context: bool) -> np.ndarray:
    """What a network reads, int64: `tokens`, or tokens·A + actions with a thought context."""
    symbols = tokens.astype(np.int64)
    return symbols * num_actions + actions if thought_context else symbols


class PrefixIndex(NamedTuple):
    """Which prefixes of a [B, T] batch are distinct, and where each of the B*(T+1) prefixes finds its own."""

    rows: np.ndarray
    """int64 [N]: flat position b*(T+1) + t of one occurrence of each distinct prefix; the root, or those of the windows in
    the order of their numbers, come first."""
    inverse: np.ndarray
    """int64 [B, T+1]: row of each prefix; 0 (a root) for those that were left out."""


def group_children(groups: np.ndarray, symbols: np.ndarray, num_symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge equal (prefix, next symbol) pairs: `first` int64 [n], one member of each child, and `child` int64 [B]."""
    _, first, child = np.unique(groups * num_symbols + symbols, return_index=True, return_inverse=True)
    return first, child


def index_prefixes(
    symbols: np.ndarray, num_steps: np.ndarray, num_symbols: int, *, finished: bool, contexts: np.ndarray | None = None
) -> PrefixIndex:
    """Index the distinct prefixes of `symbols` int [B, T] with `num_steps` int [B] real steps each.

    `contexts` int [B]: prefixes of different windows differ.
    `finished`: also index the finished sequence itself (depth `num_steps`), which only a backward head needs.
    """
    batch, steps = symbols.shape
    if batch == 0:
        return PrefixIndex(np.zeros(1, dtype=np.int64), np.zeros((0, steps + 1), dtype=np.int64))
    of_depth = np.arange(steps + 1) <= (num_steps.astype(np.int64) - (not finished))[:, None]
    of_depth[:, 0] = True
    keys = np.empty((batch, steps + 1), dtype=np.int64)
    keys[:, 0] = 0 if contexts is None else contexts
    keys[:, 1:] = np.where(of_depth[:, 1:], symbols, num_symbols)
    order = _lexicographic_order(keys, num_symbols + 1)
    keys, of_depth = keys[order], of_depth[order]
    is_first = np.ones((batch, steps + 1), dtype=bool)  # equal prefixes of sorted sequences are neighbours
    np.logical_or.accumulate(keys[1:] != keys[:-1], axis=1, out=is_first[1:])
    is_first &= of_depth
    depth, member = np.nonzero(is_first.T)
    numbers = is_first.T.ravel().cumsum().reshape(steps + 1, batch).T - 1
    inverse = np.empty((batch, steps + 1), dtype=np.int64)
    inverse[order] = np.where(of_depth, numbers, 0)
    return PrefixIndex(order[member] * (steps + 1) + depth, inverse)


def _lexicographic_order(keys: np.ndarray, base: int) -> np.ndarray:
    """Rows of `keys` int64 [B, 1 + T] in order, equal ones as they come; all columns but the first are below `base`."""
    width = int(62 / math.log2(base))  # columns that fit one word
    words = [keys[:, 0]]
    for start in range(1, keys.shape[1], width):
        part = keys[:, start : start + width]
        words.append(part @ base ** np.arange(part.shape[1] - 1, -1, -1))
    return np.lexsort(words[::-1])
