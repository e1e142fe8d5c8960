"""The other strand of DNA, for tensors; see `learner.strands`.

Shapes: B sequences, L positions, V channels (4, or 5 with the mask).
"""

import torch
from torch import Tensor

from learner.strands import COMPLEMENT


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
