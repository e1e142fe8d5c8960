"""The other strand of DNA: A C G T are 0..3, so the complement of v is 3 - v, and a mask (4) stays one."""

import torch
from torch import Tensor

NUM_BASES = 4


def reverse_complement(tokens: Tensor) -> Tensor:
    """The other strand of int [.., L] over A C G T (0..3) and the mask (4)."""
    flipped = tokens.flip(-1)
    return torch.where(flipped < NUM_BASES, NUM_BASES - 1 - flipped, flipped)


def reverse_complement_one_hot(states: Tensor) -> Tensor:
    """The other strand of [.., L, 4] or, with a mask channel, [.., L, 5]; ValueError for another alphabet."""
    if states.shape[-1] not in (NUM_BASES, NUM_BASES + 1):
        raise ValueError(f"only DNA has a reverse complement: got {states.shape[-1]} channels, allowed: 4 or 5")
    bases = states[..., :NUM_BASES].flip(-1, -2)
    return torch.cat([bases, states[..., NUM_BASES:].flip(-2)], -1)
