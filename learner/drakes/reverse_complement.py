"""The other strand of DNA. Tokens are A, C, G, T = 0..3 and, in half-finished sequences, the mask 4.

Shapes: n or B sequences, L positions, V channels (4, or 5 with the mask).
"""

import numpy as np
import torch
from torch import Tensor

NUM_BASES = 4
COMPLEMENT = (3, 2, 1, 0, 4)
"""Token of the opposite base; the mask stays a mask."""


def reverse_complement(tokens: np.ndarray) -> np.ndarray:
    """rc(x)_i = complement of x_{L-1-i}, of `tokens` int [.., L]; same shape and dtype."""
    return np.asarray(COMPLEMENT, dtype=tokens.dtype)[tokens[..., ::-1]]


def reverse_complement_tokens(tokens: Tensor) -> Tensor:
    """`reverse_complement` of a tensor int64 [.., L]."""
    return torch.tensor(COMPLEMENT, dtype=tokens.dtype, device=tokens.device)[tokens.flip(-1)]


def reverse_complement_one_hot(x: Tensor) -> Tensor:
    """The other strand of one-hot, straight-through or relaxed `x` float [.., L, V], V = 4 or 5; differentiable.

    Raises ValueError for another V: complements are those of DNA.
    """
    channels = x.shape[-1]
    if channels not in (4, 5):
        raise ValueError(f"a reverse complement needs 4 letters, or 5 channels with the mask; got {channels} channels")
    return x.flip(-2)[..., list(COMPLEMENT[:channels])]


def canonical(tokens: np.ndarray) -> np.ndarray:
    """min(x, rc(x)) in lexicographic order, of `tokens` int [n, L]: one name for both strands."""
    other = reverse_complement(tokens)
    differs = other != tokens
    first = differs.argmax(1)[:, None]
    smaller = np.take_along_axis(other, first, 1) < np.take_along_axis(tokens, first, 1)
    return np.where(smaller, other, tokens)
