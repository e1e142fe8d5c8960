"""From the log-probs of a batch to the loss that `objective` names, with its weighted terms.

Shapes: B batch, T steps, A actions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from learner.objectives import balance, divergence, entropy, lookahead, reinforcement
from learner.objectives.config import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class StepLogProbs:
    """What every objective is made of; prepared once a batch."""

    config: ObjectiveConfig
    mask: Tensor
    """bool [B, T]: real steps."""
    num_steps: Tensor
    """int64 [B]."""
    tokens: Tensor
    """int64 [B, T]: realised."""
    actions: Tensor
    """int64 [B, T]: intended."""
    log_flow: Tensor
    """float [B, T+1]: log F(s_t), log R(x) at the end."""
    log_policy: Tensor
    """float [B, T, A]."""
    log_dynamics: Tensor | None
    """float [B, T, A]: log P̂(x_t|s_t,a) of the realised token for every action, detached; None: not modelled."""
    backward_logits: Tensor | None
    """float [B, T, A] at s_{t+1}, if the network has such a head."""
    lookahead_logits: Tensor | None
    """float [B, T, k, A], if the network has such a head."""
    log_behaviour: Tensor
    """float [B, T]: log-prob of the intended action when it was drawn; NaN: not known."""
    log_reward: Tensor
    """float [B]."""

    @cached_property
    def log_pf(self) -> Tensor:
        """log π(a_t|s_t) [B, T], 0 beyond the end."""
        return torch.where(self.mask, balance.at(self.log_policy, self.actions), 0.0)

    @cached_property
    def log_pb(self) -> Tensor:
        """log P_B(a_t|s_{t+1}) [B, T]; 0 beyond the end, and without dynamics, where the intention is certain."""
        if self.log_dynamics is None:
            return torch.zeros_like(self.log_pf)
        if self.backward_logits is None:
            log_pb = balance.posterior_log_pb(self.log_policy, self.log_dynamics, self.actions)
        else:
            logits = self.backward_logits.masked_fill(self.log_policy.isneginf(), -torch.inf)
            support = self.config.backward_support
            log_pb = balance.learned_log_pb(logits, self.log_dynamics, self.actions, support=support)
        return torch.where(self.mask, log_pb, 0.0)

    @cached_property
    def log_ratio(self) -> Tensor:
        """log π + log P̂ - log P_B of each step, [B, T], 0 beyond the end."""
        if self.log_dynamics is None:
            return self.log_pf
        taken = balance.at(self.log_dynamics, self.actions)
        return torch.where(self.mask, self.log_pf + taken - self.log_pb, 0.0)

    @cached_property
    def residuals(self) -> Tensor:
        """Detailed-balance residuals [B, T]."""
        return balance.db_residuals(self.log_flow, self.log_ratio, self.mask)


def _detailed(step: StepLogProbs) -> Tensor:
    return balance.mean_square(step.residuals, step.mask)


def _marginal(step: StepLogProbs) -> Tensor:
    assert step.log_dynamics is not None
    log_pf = balance.marginal_log_pf(step.log_policy, step.log_dynamics)
    return balance.mean_square(balance.db_residuals(step.log_flow, log_pf, step.mask), step.mask)


def _trajectory(step: StepLogProbs) -> Tensor:
    return balance.tb_residuals(step.log_flow[:, 0], step.log_ratio, step.log_reward, step.mask).square().mean()


def _sub_trajectories(step: StepLogProbs) -> Tensor:
    return balance.subtb_loss(step.residuals, step.num_steps, decay=step.config.subtb_decay)


def _soft_q(step: StepLogProbs) -> Tensor:
    return balance.mean_square(balance.soft_q_residuals(step.log_flow, step.log_pf, step.mask), step.mask)


def _ppo(step: StepLogProbs) -> Tensor:
    config, entropies = step.config, entropy.policy_entropy(step.log_policy)
    return reinforcement.ppo_loss(
        step.log_pf, step.log_behaviour, step.log_flow[:, :-1], step.log_reward.exp(), entropies, step.mask,
        clip=config.ppo_clip, entropy_weight=config.ppo_entropy_weight,
    )  # fmt: skip


LOSSES: dict[str, Callable[[StepLogProbs], Tensor]] = {
    "sgfn_db": _detailed,
    "sgfn_kl": _detailed,
    "gfn_db": _detailed,
    "sgfn_marginal": _marginal,
    "tb": _trajectory,
    "subtb": _sub_trajectories,
    "soft_q": _soft_q,
    "ppo": _ppo,
}
"""By `objective.name`; a new objective is a function and a line here."""


def objective_loss(step: StepLogProbs) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with all its terms, and the parts as metrics."""
    config = step.config
    loss = LOSSES[config.name](step)
    metrics = {"balance_loss": loss}
    kl_weight, exploration_weight = config.weight("kl_weight"), config.weight("exploration_weight")
    if kl_weight > 0 or exploration_weight > 0:
        entropies = entropy.normalised_entropy(step.log_policy)
        ratio = entropy.entropy_ratio(entropies, step.mask, gamma=config.gamma, quantile=config.entropy_quantile)
        names = ("entropy_high", "entropy_low", "entropy_ratio", "entropy_share")
        metrics |= {name: value.mean() for name, value in zip(names, ratio, strict=True)}
        if kl_weight > 0:
            kl, metrics["trajectory_kl"] = _divergence(step)
            loss = loss + kl_weight * (kl - ratio.ratio.log().mean())
        if exploration_weight > 0:
            exploration = entropy.exploration_loss(entropies, ratio.share, step.mask, gamma=config.gamma)
            loss, metrics["exploration_loss"] = loss + exploration_weight * exploration, exploration
    if step.lookahead_logits is not None:
        targets = lookahead.lookahead_targets(step.tokens, step.mask, config.lookahead_steps)
        ahead = lookahead.lookahead_loss(step.lookahead_logits, targets)
        loss = loss + config.lookahead_weight * ahead
        metrics["lookahead_ce"] = ahead
    return loss, metrics


def _divergence(step: StepLogProbs) -> tuple[Tensor, Tensor]:
    """What is minimised, and the value of the divergence."""
    config = step.config
    if config.kl == "posterior":
        assert step.log_dynamics is not None
        kl = divergence.posterior_kl(step.log_policy, step.log_dynamics, step.mask)
        return kl, kl
    weights = divergence.importance_weights(step.log_pf, step.log_behaviour, limit=config.max_importance_weight)
    log_ratio = step.log_ratio.sum(1) - step.log_reward
    baseline = divergence.leave_one_out(log_ratio, weights)
    surrogate = divergence.flow_kl(step.log_pf.sum(1), step.log_pb.sum(1), log_ratio, weights, baseline)
    value = (weights * (log_ratio + step.log_flow[:, 0])).sum() / weights.sum().clamp(min=1e-30)
    return surrogate, value
