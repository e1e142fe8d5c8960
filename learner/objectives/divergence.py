"""Divergence of the sampler's trajectories from the target's.

Malkin et al. 2022 (arXiv 2210.00580): the trajectory law P_F(τ) against P_B(τ|x)R(x)/Z. Shapes: B batch, T steps, A
actions. Steps beyond a trajectory's end are zero in every log-prob given here.
"""

import torch
from torch import Tensor

from learner.objectives.balance import marginal_log_pf


def importance_weights(log_pf: Tensor, log_behaviour: Tensor, *, limit: float) -> Tensor:
    """π(τ)/behaviour(τ), at most `limit`, detached, float [B]; 0 where the behaviour is not known (NaN).

    `log_pf`, `log_behaviour` float [B, T] of the intended actions; the environment's factors cancel.
    """
    ratio = (log_pf.detach() - log_behaviour).sum(1).exp().clamp(max=limit)
    return torch.where(ratio.isnan(), 0.0, ratio)


def leave_one_out(values: Tensor, weights: Tensor) -> Tensor:
    """For each trajectory the weighted mean of `values` [B] over the others: a baseline that keeps gradients unbiased."""
    exact_weights, products = weights.double(), weights.double() * values.double()  # differences would cancel
    others = exact_weights.sum() - exact_weights
    means = torch.where(others > 0, (products.sum() - products) / others.clamp(min=1e-30), 0.0)
    return means.to(values.dtype)


def flow_kl(log_pf: Tensor, log_pb: Tensor, log_ratio: Tensor, weights: Tensor, baseline: Tensor) -> Tensor:
    """A scalar whose gradient estimates that of D_KL(P_F(τ) ‖ P_B(τ|x)R(x)/Z); its value means nothing.

    ∇ = E_{P_F}[(ℓ - baseline) ∇ log P_F] - E_{P_F}[∇ log P_B] with ℓ = log P_F - log P_B - log R. `log_pf`, `log_pb`
    float [B]: sums over steps of log π and log P_B; `log_ratio` float [B]: ℓ; `weights` [B] of the trajectories (see
    `importance_weights`); `baseline` float [B], not depending on the trajectory's own ℓ (see `leave_one_out`).
    """
    score_function = (log_ratio - baseline).detach() * log_pf
    return (weights * (score_function - log_pb)).sum() / len(weights)


def posterior_kl(log_policy: Tensor, log_dynamics: Tensor, mask: Tensor) -> Tensor:
    """Mean over states of Σ_a π(a|s_t)[log π(a|s_t) - log P_B(a|s_{t+1})] with P_B by Bayes, a scalar >= 0.

    `log_policy`, `log_dynamics` float [B, T, A] as in `balance.posterior_log_pb`. Since log π - log P_B = log Σ_b π P̂ -
    log P̂(x|s,a), this penalises doubt about the intention once the outcome is known: averaged over outcomes it is zero
    for a policy that is certain and largest for the uniform one.
    """
    possible = log_policy > -torch.inf
    gap = marginal_log_pf(log_policy, log_dynamics)[..., None] - torch.where(possible, log_dynamics, 0.0)
    terms = torch.where(possible, log_policy.exp() * gap, 0.0).sum(-1)
    return torch.where(mask, terms, 0.0).sum() / mask.sum()
