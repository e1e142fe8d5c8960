"""Distinct prefixes of a batch, so that each is computed once.

Shapes: B sequences, T steps, N distinct prefixes, A actions.
"""

from typing import NamedTuple

import numpy as np


class PrefixIndex(NamedTuple):
    """Which prefixes of a [B, T] batch are distinct, and where each of the B*(T+1) prefixes finds its own."""

    rows: np.ndarray
    """int64 [N]: flat position b*(T+1) + t of one occurrence of each distinct prefix; the root comes first."""
    inverse: np.ndarray
    """int64 [B, T+1]: row of each prefix; 0 (the root) for those that were left out."""


def group_children(groups: np.ndarray, tokens: np.ndarray, num_actions: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge equal (prefix, next token) pairs: `first` int64 [n], one member of each child, and `child` int64 [B]."""
    _, first, child = np.unique(groups * num_actions + tokens, return_index=True, return_inverse=True)
    return first, child


def index_prefixes(tokens: np.ndarray, num_steps: np.ndarray, num_actions: int, *, finished: bool) -> PrefixIndex:
    """Index the distinct prefixes of `tokens` int [B, T] with `num_steps` int [B] realised steps each.

    `finished`: also index the finished sequence itself (depth `num_steps`), which only a backward head needs.
    """
    batch, steps = tokens.shape
    rows, inverse = [np.zeros(1, dtype=np.int64)], np.zeros((batch, steps + 1), dtype=np.int64)
    groups, count, all_distinct = np.zeros(batch, dtype=np.int64), 1, batch == 1
    last_depth = num_steps.astype(np.int64) - (0 if finished else 1)
    for depth in range(1, int(last_depth.max(initial=0)) + 1):
        members = np.flatnonzero(last_depth >= depth)
        if all_distinct:
            first = child = np.arange(len(members))
        else:
            first, child = group_children(groups[members], tokens[members, depth - 1].astype(np.int64), num_actions)
            all_distinct = len(first) == len(members)
        groups[members] = child
        inverse[members, depth] = count + child
        rows.append(members[first] * (steps + 1) + depth)
        count += len(first)
    return PrefixIndex(np.concatenate(rows), inverse)
