"""Terms that join the reward and the KL in fine-tuning; all are minimised.

`x` is one-hot, straight-through or relaxed. Shapes: B sequences, L positions, V letters.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

AdversarialForm = Literal["non_saturating", "saturating", "logit"]


def soft_hamming(x: Tensor) -> Tensor:
    """Mean over pairs n ≠ m of (1/L) Σ_i (1 - <x_ni, x_mi>), a scalar, of `x` float [B, L, V]; O(BLV).

    With c_iv = Σ_n x_niv the sum of all inner products of pairs is ||c||² - ||x||². On one-hots it is the mean Hamming
    distance as a share of L: 3/4 expected of uniform DNA, at most 1. It sees the letters of each position by themselves:
    four homopolymers look as diverse as four sequences can be. Raises ValueError for fewer than two sequences.
    """
    batch, length = x.shape[:2]
    if batch < 2:
        raise ValueError(f"diversity needs at least 2 sequences, got {batch}")
    agreement = x.sum(0).square().sum() - x.square().sum()
    return 1 - agreement / (length * batch * (batch - 1))


def diversity_loss(x: Tensor, *, target: float | None = None) -> Tensor:
    """-d for d = `soft_hamming(x)`, or max(0, target - d), which no longer pushes once `target` (0 to 1) is reached."""
    diversity = soft_hamming(x)
    return -diversity if target is None else torch.relu(target - diversity)


_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "non_saturating": lambda logits: softplus(-logits),
    "saturating": lambda logits: logsigmoid(-logits),
    "logit": torch.neg,
}


def adversarial_loss(logits: Tensor, form: AdversarialForm = "non_saturating") -> Tensor:
    """The generator's loss, a scalar, from the discriminator's `logits` d [B] of its samples (Goodfellow et al. 2014).

    non_saturating: -E log σ(d), slope -σ(-d). saturating: E log(1 - σ(d)), slope -σ(d), which vanishes where the
    discriminator is sure. logit: -E d, which for the optimal discriminator is KL(generator ‖ data).
    """
    return _FORMS[form](logits).mean()


def discriminator_loss(real: Tensor, fake: Tensor, *, real_label: float = 1.0) -> Tensor:
    """Cross-entropy of the logits of real [B] and of generated [B'] sequences, a scalar.

    One-sided label smoothing (Salimans et al. 2016): real sequences carry the label `real_label`, which bounds the
    optimal logit where nothing is generated at log(real_label / (1 - real_label)).
    """
    return (real_label * softplus(-real) + (1 - real_label) * softplus(real)).mean() + softplus(fake).mean()


def gradient_penalty(logits: Tensor, x: Tensor) -> Tensor:
    """R1: half the mean squared norm of ∂d/∂x on real sequences, a scalar (Mescheder et al. 2018, eq. 9, without γ).

    `logits` [B] computed from `x` float [B, L, V], a leaf with gradient; the result can be differentiated again.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()
