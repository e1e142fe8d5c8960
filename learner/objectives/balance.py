"""Balance residuals of (stochastic) GFlowNets.

Bengio et al. 2021 (arXiv 2111.09266) for detailed balance; Pan et al. 2023 (2302.09465) for stochastic dynamics.
Shapes: B batch, T steps, A actions. Steps at or beyond `num_steps` are padding: `mask` is False there, residuals are 0.

Finished sequences form the leaves of a tree, so the parent of a state is certain; what is not certain is the action
that was intended. P_B(a|s') is the posterior over intentions.
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
    return _at(joint, actions) - joint.logsumexp(-1)


def learned_log_pb(backward_logits: Tensor, log_dynamics: Tensor, actions: Tensor, *, support: float) -> Tensor:
    """log P_B(a_t|s_{t+1}) from a softmax head, limited to actions that could have led here, float [B, T].

    An action belongs to the support if P̂(x_t|s_t,a) > `support`; the taken action always does. `backward_logits`
    [B, T, A] are those at s_{t+1}. Without the limit an untrained head leaks mass to impossible intentions.
    """
    impossible = (log_dynamics <= torch.log(torch.tensor(support, device=log_dynamics.device))).scatter(
        -1, actions[..., None], False
    )
    return _at(backward_logits.masked_fill(impossible, -torch.inf).log_softmax(-1), actions)


def gfn_db_residuals(log_flow: Tensor, log_pf: Tensor, mask: Tensor) -> Tensor:
    """δ_t = log F(s_t) + log π(a_t|s_t) - log F(s_{t+1}), float [B, T]; P_B = 1 on a tree with deterministic steps.

    `log_flow` [B, T+1] ends in log R (see `end_flows`); `log_pf` [B, T] is log π of the action taken.
    """
    return torch.where(mask, log_flow[:, :-1] + log_pf - log_flow[:, 1:], 0.0)


def sgfn_db_residuals(log_flow: Tensor, log_pf: Tensor, log_dynamics: Tensor, log_pb: Tensor, mask: Tensor) -> Tensor:
    """δ_t = log F(s_t) + log π(a_t|s_t) + log P̂(x_t|s_t,a_t) - log F(s_{t+1}) - log P_B(a_t|s_{t+1}), float [B, T].

    Pan et al. 2023, eq. 10, there for the squared residual. `log_dynamics` [B, T] is that of the intended action.
    """
    return torch.where(mask, log_flow[:, :-1] + log_pf + log_dynamics - log_flow[:, 1:] - log_pb, 0.0)


def mean_square(residuals: Tensor, mask: Tensor) -> Tensor:
    """Mean of δ² over real steps; residuals [B, T] are zero at padding."""
    return residuals.square().sum() / mask.sum()


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[b, t, index[b, t]]."""
    return values.gather(-1, index[..., None]).squeeze(-1)
