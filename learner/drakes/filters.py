"""Filters of logits when sampling: temperature, top-k and top-p (nucleus, Holtzman et al., arXiv 1904.09751).

They change the law that is sampled, so they have no place in fine-tuning or likelihoods.
"""

import torch
from pydantic import Field
from torch import Tensor

from learner.configs import StrictConfig


class FilterConfig(StrictConfig):
    """How the denoiser's law is sharpened when sampling; the defaults leave it as it is."""

    temperature: float = Field(1.0, gt=0)
    """Logits are divided by it."""
    top_k: int | None = Field(None, ge=1)
    """Only the k likeliest tokens (and those equal to the k-th) are drawn; null: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Only the likeliest tokens that are needed to reach this mass are drawn; 1: all."""

    def apply(self, logits: Tensor) -> Tensor:
        """Logits [.., V], with those of excluded tokens minus infinity; ValueError if top_k is above V."""
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        return top_p(logits, self.top_p)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [.., V] that reach the k-th largest, others minus infinity; ties are kept. ValueError unless 1 <= k <= V."""
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"top_k {k}: allowed: 1 to {logits.shape[-1]}")
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Logits [.., V] whose mass of strictly likelier tokens is below `p`, others minus infinity.

    The token that crosses `p` stays, so the likeliest always does, and p = 1 is the identity. ValueError unless 0 < p <= 1.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p {p}: allowed: above 0 and at most 1")
    if p == 1:
        return logits
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    likelier = torch.nn.functional.pad(ordered.cumsum(-1)[..., :-1], (1, 0))
    excluded = likelier >= p
    return logits.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), -torch.inf)
