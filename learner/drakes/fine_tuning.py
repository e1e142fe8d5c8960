"""Fine-tuning rollouts: sampling with a graph from reward and path KL back to the denoiser (DRAKES, arXiv 2410.13643).

Which positions are revealed in which step does not depend on θ, only the tokens do. So only tokens are relaxed, by
straight-through Gumbel-softmax, and the forward pass is ancestral sampling itself.

Shapes: B sequences, L positions, V tokens (the mask is token V), N steps. Units: nats a sequence.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from learner.configs import StrictConfig
from learner.drakes.denoiser import TokenModel, encode
from learner.drakes.sampling import RevealPlan, draw_reveal_steps, gumbel_like, plan_rounds
from learner.drakes.schedule import SCHEDULES, MaskingSchedule, ScheduleName


class RolloutConfig(StrictConfig):
    """How sequences are drawn for fine-tuning, and which gradients they carry."""

    num_steps: int = Field(8, ge=1)
    """Reverse steps N; the length of the sequences is nearly one position at a time."""
    estimator: Literal["straight_through", "relaxed", "reinforce"] = "straight_through"
    """Gradient of the reward: straight_through (tokens relaxed, exact samples), relaxed (tokens and masks relaxed in the last
    steps, as the authors released it) or reinforce (log-probabilities of the drawn tokens, for any reward)."""
    temperature: float = Field(0.5, gt=0)
    """Of the Gumbel-softmax. The reward's gradient comes out shorter than it is, the more so the higher this is."""
    truncation: int | None = Field(None, ge=0)
    """Only the last so many steps carry the reward's gradient, which shortens it; null: all. No effect on reinforce."""
    kl_evaluations: int | None = Field(None, ge=1)
    """Evaluations of the pretrained model a rollout, at randomly chosen states and weighted up; null: at all."""
    state_gradient: bool = True
    """Whether the path KL also counts how early tokens change the KL of later steps."""
    checkpoint: bool = False
    """Recompute the network in the backward pass: memory of one step instead of all, a third more time."""
    schedule: ScheduleName = "log_linear"
    """Masking schedule."""

    @model_validator(mode="after")
    def _within_steps(self) -> "RolloutConfig":
        if self.truncation is not None and self.truncation > self.num_steps:
            raise ValueError(f"truncation {self.truncation} must not exceed num_steps {self.num_steps}")
        return self


@dataclass(frozen=True)
class Rollout:
    """Sequences drawn from a denoiser, with the graph that its estimator needs."""

    x0: Tensor
    """float [B, L, V]: one-hot; straight-through (gradients of the relaxation) unless the estimator is reinforce."""
    tokens: Tensor
    """int64 [B, L]."""
    reveal_steps: Tensor
    """int64 [B, L]: step that drew each token; in relaxed rollouts 0 where it was one of the relaxed steps."""
    path_kl: Tensor
    """float [B]: KL of θ's steps to the pretrained ones, summed analytically over the visited states."""
    log_ratio: Tensor
    """float [B]: Σ log p_θ/p_pre of the drawn tokens, without graph; its mean is that of `path_kl`. NaN if relaxed."""
    log_prob: Tensor
    """float [B]: Σ log p_θ of the drawn tokens; with a graph (at fixed states) only if reinforce. NaN if relaxed."""


def step_kl(log_probs: Tensor, pretrained: Tensor, masked: Tensor, unmask_prob: Tensor | float) -> Tensor:
    """float [B]: KL of one reverse step, u Σ over masked i of KL(p_θ^i ‖ p_pre^i) (2410.13643, eq. 3, for absorbing noise).

    `log_probs` and `pretrained` [B, L, V]; `masked` [B, L], bool or a mask's mass; `unmask_prob` u, [B] or a number.
    """
    return unmask_prob * ((log_probs.exp() * (log_probs - pretrained)).sum(-1) * masked).sum(-1)


def rollout(
    model: TokenModel,
    pretrained: TokenModel,
    num_sequences: int,
    config: RolloutConfig,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Rollout:
    """Draw sequences from `model` and measure their KL to `pretrained`, whose parameters should take no gradient."""
    return _Roller(model, pretrained, config, generator).run(num_sequences, torch.device(device))


def reinforce_loss(rollout: Rollout, rewards: Tensor, alpha: float) -> Tensor:
    """Surrogate whose gradient is that of -E[R - alpha · KL_path] (leave-one-out REINFORCE, Kool et al. 2019).

    `rewards` float [B] of any black box; `alpha` in reward a nat. Raises ValueError for fewer than two sequences.
    """
    if len(rewards) < 2:
        raise ValueError("the leave-one-out baseline needs at least two sequences")
    value = (rewards - alpha * rollout.log_ratio).detach()
    advantage = (value - value.mean()) * len(value) / (len(value) - 1)
    return -(advantage * rollout.log_prob).mean()


class _Roller:
    """One rollout under construction."""

    def __init__(
        self, model: TokenModel, pretrained: TokenModel, config: RolloutConfig, generator: torch.Generator | None
    ):
        self.model, self.pretrained, self.config, self.generator = model, pretrained, config, generator
        self.schedule: MaskingSchedule = SCHEDULES[config.schedule]
        self.truncation = config.num_steps if config.truncation is None else config.truncation

    def run(self, batch: int, device: torch.device) -> Rollout:
        num_steps, length, mask = self.config.num_steps, self.model.length, self.model.num_tokens
        masked = torch.ones(batch, length, dtype=torch.bool, device=device)
        steps = draw_reveal_steps(masked, num_steps, self.schedule, self.generator)
        self.plan = plan_rounds(steps, num_steps, split=self.truncation)
        self.cumulative = functional.pad(self.schedule.unmask_probs(num_steps).cumsum(0), (1, 0)).to(device)
        self.last_step = torch.full((batch,), num_steps + 1, device=device)
        self.path_kl = torch.zeros(batch, device=device)
        self.log_ratio, self.log_prob = torch.zeros_like(self.path_kl), torch.zeros_like(self.path_kl)
        states = encode(torch.full_like(steps, mask), mask)
        if self.config.estimator == "relaxed":
            return self._relaxed(states)
        for number in range(self.plan.num_rounds):
            states = self._round(states, number, self._kl_scale(number, 0, self.plan.num_rounds))
        x0 = states[..., :-1]
        return Rollout(x0, x0.argmax(-1), steps, self.path_kl, self.log_ratio, self.log_prob)
