"""Exact laws of the search baselines on an enumerable space of fixed-length sequences.

What a Metropolis–Hastings chain of designs has reached after so many steps, and what the environment's noise then makes
of a law of designs. Shapes: V tokens, A actions (as many), T positions, n = V^T sequences in lexicographic order, as
`SequenceSpace.enumerate` lists them.
"""

import numpy as np

from learner.exact import total_variation
from learner.space import SequenceSpace

STATIONARY = 1e-15
"""A step that changes the law by less than this in TV ends the iteration."""


def metropolis_law(space: SequenceSpace, log_rewards: np.ndarray, num_steps: int) -> np.ndarray:
    """float64 [n]: the exact law of one chain, started uniformly, after `num_steps` steps (fewer if it stands still).

    A step proposes another token at one position, both uniformly drawn, and accepts with probability min(1, R(y)/R(x))
    (Metropolis et al. 1953). `log_rewards` float [n]: log R; minus infinity stands for an impossible sequence, which is
    entered from impossible ones only. Holds the n·T·V probabilities of all moves.
    Raises ValueError for a space of variable length, and for log R that do not fit.
    """
    log_rewards = np.asarray(log_rewards, dtype=np.float64)
    _check_fixed(space, log_rewards, "log_rewards")
    if not (log_rewards < np.inf).all():
        raise ValueError("log_rewards: allowed are finite numbers and minus infinity")
    moves = [_moves(space, log_rewards, position) for position in range(space.max_length)]
    law = np.full(len(log_rewards), 1 / len(log_rewards))
    for _ in range(num_steps):
        before, law = law, np.zeros_like(law)
        for position, move in enumerate(moves):
            law += np.einsum("lir,lijr->ljr", _along(space, before, position), move).reshape(-1)
        law /= space.max_length
        if total_variation(law, before) < STATIONARY:
            break
    return law


def law_through_noise(space: SequenceSpace, law: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """float64 [n]: the law of realised sequences when designs from `law` [n] are made under noise.

    `kernel` float [T, A, A]: K_t(x|a), intended token first. Raises ValueError for a space of variable length.
    """
    realised = np.asarray(law, dtype=np.float64)
    _check_fixed(space, realised, "law")
    for position in range(space.max_length):
        blocks = _along(space, realised, position)
        realised = np.einsum("lar,ax->lxr", blocks, np.asarray(kernel[position], dtype=np.float64)).reshape(-1)
    return realised


def _check_fixed(space: SequenceSpace, values: np.ndarray, name: str) -> None:
    if space.variable_length:
        raise ValueError("the laws of search baselines are known for sequences of fixed length only")
    if values.shape != (space.num_sequences,):
        raise ValueError(f"{name}: shape {values.shape}; allowed: ({space.num_sequences},), one value a sequence")


def _along(space: SequenceSpace, values: np.ndarray, position: int) -> np.ndarray:
    """`values` [n] as [V^t, V, V^(T-1-t)], the token at `position` t in the middle."""
    return values.reshape(space.num_tokens**position, space.num_tokens, -1)


def _moves(space: SequenceSpace, log_rewards: np.ndarray, position: int) -> np.ndarray:
    """float64 [V^t, V, V, V^(T-1-t)]: probability that a step at `position` t leads from one token to another."""
    values = _along(space, log_rewards, position)
    with np.errstate(invalid="ignore"):
        log_ratio = values[:, None] - values[:, :, None]
    log_ratio[np.isnan(log_ratio)] = 0  # between two impossible sequences
    moves = np.exp(np.minimum(log_ratio, 0)) / (space.num_tokens - 1)
    own = np.arange(space.num_tokens)
    moves[:, own, own] = 0
    moves[:, own, own] = 1 - moves.sum(2)
    return moves
