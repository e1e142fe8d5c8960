"""Balance residuals of (stochastic) GFlowNets.

Bengio et al. 2021 (arXiv 2111.09266) for detailed balance, Malkin et al. 2022 (2201.13259) for trajectory balance, Madan
et al. 2023 (2209.12782) for sub-trajectories, Pan et al. 2023 (2302.09465) for stochastic dynamics.
Shapes: B batch, T steps, A actions. Steps at or beyond `num_steps` are padding: `mask` is False there, residuals are 0.

Finished sequences form the leaves of a tree, so the parent of a state is certain; what is not certain is the action
that was intended. P_B(a|s') is the posterior over intentions. A step's `log_ratio` is log π + log P̂ - log P_B.
"""

import torch
from torch import Tensor


def step_mask(num_steps: Tensor, max_steps: int) -> Tensor:
    """bool [B, T]: True at real steps; `num_steps` int64 [B]."""
    return torch.arange(max_steps, device=num_steps.device) < num_steps[:, None]


def end_flows(log_flow: Tensor, log_reward: Tensor, num_steps: Tensor) -> Tensor:
    """log F(s_0..s_T) float [B, T+1] with log F(s_end) := log R(x), `log_reward` float [B]."""
    ends = torch.arange(log_flow.shape[1], device=log_flow.device) == num_steps[:, None]
    return torch.where(ends, log_reward[:, None], log_flow)


def posterior_log_pb(log_policy: Tensor, log_dynamics: Tensor, actions: Tensor) -> Tensor:
    """Bayes: log P_B(a_t|s_{t+1}) = log π(a|s)P̂(x|s,a) - log Σ_b π(b|s)P̂(x|s,b), float [B, T].

    `log_policy` [B, T, A]; `log_dynamics` [B, T, A]: log P̂(x_t|s_t,a) of the realised token for every action;
    `actions` int64 [B, T]: the intended ones.
    """
    joint = log_policy + log_dynamics
    return at(joint, actions) - joint.logsumexp(-1)


def learned_log_pb(backward_logits: Tensor, log_dynamics: Tensor, actions: Tensor, *, support: float) -> Tensor:
    """log P_B(a_t|s_{t+1}) from a softmax head, limited to actions that could have led here, float [B, T].

    An action belongs to the support if P̂(x_t|s_t,a) > `support`; the taken action always does. `backward_logits`
    [B, T, A] are those at s_{t+1}. Without the limit an untrained head leaks mass to impossible intentions.
    """
    impossible = (log_dynamics <= torch.log(torch.tensor(support, device=log_dynamics.device))).scatter(
        -1, actions[..., None], False
    )
    return at(backward_logits.masked_fill(impossible, -torch.inf).log_softmax(-1), actions)


def marginal_log_pf(log_policy: Tensor, log_dynamics: Tensor) -> Tensor:
    """log Σ_a π(a|s_t)P̂(x_t|s_t,a) float [B, T], from `log_policy` and `log_dynamics` [B, T, A]."""
    return (log_policy + log_dynamics).logsumexp(-1)


def db_residuals(log_flow: Tensor, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """δ_t = log F(s_t) + log_ratio_t - log F(s_{t+1}), float [B, T]; `log_flow` [B, T+1] ends in log R (`end_flows`).

    With log π alone as ratio: detailed balance on a tree with deterministic steps, where P_B = 1. With log π + log P̂ -
    log P_B: Pan et al. 2023, eq. 10, there for the squared residual. With `marginal_log_pf`: marginal balance.
    """
    return torch.where(mask, log_flow[:, :-1] + log_ratio - log_flow[:, 1:], 0.0)


def soft_q_residuals(log_flow: Tensor, log_pf: Tensor, mask: Tensor) -> Tensor:
    """δ_t = Q(s_t,a_t) - V(s_{t+1}) float [B, T] of entropy-regularised Q-learning, the target V held fixed.

    Q(s,a) = V(s) + log π(a|s) with V = log F and π = softmax Q (Haarnoja et al. 2017, arXiv 1702.08165, temperature 1).
    """
    return torch.where(mask, log_flow[:, :-1] + log_pf - log_flow[:, 1:].detach(), 0.0)


def tb_residuals(log_z: Tensor, log_ratio: Tensor, log_reward: Tensor, mask: Tensor) -> Tensor:
    """log Z + Σ_t log_ratio_t - log R(x), float [B]; `log_z` float [] or [B], `log_reward` float [B]."""
    return log_z + torch.where(mask, log_ratio, 0.0).sum(1) - log_reward


def subtb_loss(residuals: Tensor, num_steps: Tensor, *, decay: float) -> Tensor:
    """Mean over trajectories of Σ_{i<j} w_{j-i} (Σ_{i≤t<j} δ_t)² / Σ_{i<j} w_{j-i}, w_n = decay^n, from δ float [B, T].

    Madan et al. 2023, eq. 8. Weights are scaled by the largest, so that no decay overflows.
    """
    steps = residuals.shape[1]
    sums = torch.nn.functional.pad(residuals.cumsum(1), (1, 0))
    ends = torch.arange(steps + 1, device=residuals.device)
    length = (ends[None, :] - ends[:, None]).to(residuals.dtype)
    power = length[None] - 1 if decay < 1 else length[None] - num_steps[:, None, None]
    inside = (length > 0)[None] & (ends <= num_steps[:, None])[:, None, :]
    weights = torch.where(inside, torch.as_tensor(decay, dtype=residuals.dtype, device=residuals.device) ** power, 0.0)
    weights = weights / weights.sum((1, 2), keepdim=True)
    return (weights * (sums[:, None, :] - sums[:, :, None]).square()).sum((1, 2)).mean()


def mean_square(residuals: Tensor, mask: Tensor) -> Tensor:
    """Mean of δ² over real steps; residuals [B, T] are zero at padding."""
    return residuals.square().sum() / mask.sum()


def at(values: Tensor, index: Tensor) -> Tensor:
    """values[b, t, index[b, t]], from `values` [B, T, A] and `index` int64 [B, T]."""
    return values.gather(-1, index[..., None]).squeeze(-1)
