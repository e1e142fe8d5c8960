"""Reward seeking, to compare with. Shapes: B batch, T steps, A actions."""

import torch
from torch import Tensor


def ppo_loss(
    log_pf: Tensor, log_behaviour: Tensor, values: Tensor, returns: Tensor, entropy: Tensor, mask: Tensor,
    *, clip: float, entropy_weight: float,
) -> Tensor:  # fmt: skip
    """Clipped policy gradient, squared error of the values, and entropy bonus (Schulman et al. 2017, arXiv 1707.06347).

    `log_pf`, `log_behaviour` float [B, T]: log π of the intended action now and when it was drawn (NaN: not known, the
    step does not count); `values` [B, T]: V(s_t); `returns` [B]: the reward, paid at the end, not discounted; `entropy`
    [B, T] in nats.
    """
    known = mask & ~log_behaviour.isnan()
    advantage = returns[:, None] - values.detach()
    ratio = torch.where(known, log_pf - log_behaviour.nan_to_num(), 0.0).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    error = (returns[:, None] - values).square()
    return torch.where(known, 0.5 * error - gain - entropy_weight * entropy, 0.0).sum() / known.sum().clamp(min=1)
