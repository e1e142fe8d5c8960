"""The other strand of DNA. Tokens are A, C, G, T = 0..3 and, in half-finished sequences, the mask 4.

Shapes: n sequences, L positions.
"""

import numpy as np

NUM_BASES = 4
COMPLEMENT = (3, 2, 1, 0, 4)
"""Token of the opposite base; the mask stays a mask."""


def reverse_complement(tokens: np.ndarray) -> np.ndarray:
    """rc(x)_i = complement of x_{L-1-i}, of `tokens` int [.., L]; same shape and dtype."""
    return np.asarray(COMPLEMENT, dtype=tokens.dtype)[tokens[..., ::-1]]


def canonical(tokens: np.ndarray) -> np.ndarray:
    """min(x, rc(x)) in lexicographic order, of `tokens` int [n, L]: one name for both strands."""
    other = reverse_complement(tokens)
    differs = other != tokens
    first = differs.argmax(1)[:, None]
    smaller = np.take_along_axis(other, first, 1) < np.take_along_axis(tokens, first, 1)
    return np.where(smaller, other, tokens)
