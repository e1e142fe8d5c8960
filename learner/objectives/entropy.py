"""Entropies of the policy along trajectories: their ratio, and exploration.

The entropy ratio is modelled on the α-relative density ratio of Yamada et al. 2011 (NeurIPS 24): bounded, so that its
logarithm is safe. Shapes: B batch, T steps, A actions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_ENTROPY = 1e-6
"""High entropies below this count as none: of smaller ones the gradient of the ratio overflows."""
SHARE_LIMIT = 1e-3
"""The share of the high entropy is kept this far from 0 and 1 in the exploration term."""


def policy_entropy(log_policy: Tensor) -> Tensor:
    """H(π(·|s)) in nats, float [B, T]; `log_policy` float [B, T, A] is minus infinity at impossible actions."""
    return -(log_policy.exp() * log_policy.masked_fill(log_policy == -torch.inf, 0.0)).sum(-1)


def normalised_entropy(log_policy: Tensor) -> Tensor:
    """`policy_entropy` over the log of the number of possible actions, in [0, 1]; 0 where only one is possible."""
    count, entropy = (log_policy > -torch.inf).sum(-1), policy_entropy(log_policy)
    return torch.where(count > 1, entropy / count.clamp(min=2).to(entropy.dtype).log(), 0.0).clamp(0, 1)


def masked_quantile(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """The q-quantile of each row over its unmasked entries, linearly interpolated, [B, 1]; each row has at least one."""
    ordered = values.masked_fill(~mask, torch.inf).sort(1).values
    place = (mask.sum(1, keepdim=True) - 1) * q
    below = place.floor()
    low, high = ordered.gather(1, below.long()), ordered.gather(1, place.ceil().long())
    return low + (high - low) * (place - below)


class EntropyRatio(NamedTuple):
    """High and low entropy of each trajectory and their ratio, each [B, 1]."""

    high: Tensor
    """H_high, the q-quantile of the normalised entropies over steps."""
    low: Tensor
    """H_low, the (1-q)-quantile."""
    ratio: Tensor
    """r_γ = H_high / (γ H_high + (1-γ) H_low), in [1, 1/γ]; 1 where all entropies are (about) 0."""
    share: Tensor
    """ρ = γ r_γ, in [γ, 1]: the share of the high entropy in the mixture."""


def entropy_ratio(entropy: Tensor, mask: Tensor, *, gamma: float, quantile: float) -> EntropyRatio:
    """From normalised entropies [B, T]; `gamma` in (0, 1), `quantile` in (.5, 1]."""
    high, low = masked_quantile(entropy, mask, quantile), masked_quantile(entropy, mask, 1 - quantile)
    some = high > MIN_ENTROPY
    mixture = torch.where(some, gamma * high + (1 - gamma) * low, 1.0)
    ratio = torch.where(some, high / mixture, 1.0)
    return EntropyRatio(high, low, ratio, gamma * ratio)


def exploration_loss(entropy: Tensor, share: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """mean H(s)·[log ρ + (1-γ)(1-H(s))·log(1-ρ)] over visited states, a scalar <= 0.

    To lower it raises the entropy of every peaked policy (H < 1/2), and of all while ρ is not close to 1; with the
    opposite sign, |log ρ| would be a price of entropy. `entropy` [B, T] is normalised; `share` [B, 1] is ρ, here a
    coefficient of the trajectory (no gradient), kept within `SHARE_LIMIT` of its ends.
    """
    rho = share.detach().clamp(SHARE_LIMIT, 1 - SHARE_LIMIT)
    terms = entropy * (rho.log() + (1 - gamma) * (1 - entropy) * (1 - rho).log())
    return torch.where(mask, terms, 0.0).sum() / mask.sum()
