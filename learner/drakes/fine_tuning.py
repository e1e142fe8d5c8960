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
from learner.drakes.schedule import SCHEDULES, ScheduleName


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
    """One rollout under construction: accumulates KL and log-probabilities round by round."""

    def __init__(
        self, model: TokenModel, pretrained: TokenModel, config: RolloutConfig, generator: torch.Generator | None
    ):
        self.model, self.pretrained, self.config, self.generator = model, pretrained, config, generator
        self.truncation = config.num_steps if config.truncation is None else config.truncation
        self.unmask_probs = SCHEDULES[config.schedule].unmask_probs(config.num_steps).float()

    def run(self, batch: int, device: torch.device) -> Rollout:
        config, mask = self.config, self.model.num_tokens
        masked = torch.ones(batch, self.model.length, dtype=torch.bool, device=device)
        steps = draw_reveal_steps(masked, config.num_steps, SCHEDULES[config.schedule], self.generator)
        relaxed = config.estimator == "relaxed"
        plan = plan_rounds(steps, config.num_steps, split=self.truncation)
        num_rounds = plan.num_early if relaxed else plan.num_rounds
        self._choose_measured(num_rounds + self.truncation * relaxed)
        self.until = functional.pad(self.unmask_probs.cumsum(0), (1, 0)).to(device)
        self.last_step = torch.full((batch,), config.num_steps + 1, device=device)
        self.path_kl = torch.zeros(batch, device=device)
        self.log_ratio, self.log_prob = torch.zeros_like(self.path_kl), torch.zeros_like(self.path_kl)
        states = encode(torch.full_like(steps, mask), mask)
        for number in range(num_rounds):
            states = self._round(states, plan, number)
        if relaxed:
            return self._relaxed(states, steps, num_rounds)
        return Rollout(states[..., :-1], states.argmax(-1), steps, self.path_kl, self.log_ratio, self.log_prob)

    def _choose_measured(self, num_rounds: int) -> None:
        """Rounds whose KL is measured, and the factor that makes up for the others."""
        chosen = num_rounds if self.config.kl_evaluations is None else min(self.config.kl_evaluations, num_rounds)
        self.measured = set(torch.randperm(num_rounds, generator=self.generator)[:chosen].tolist())
        self.scale = num_rounds / max(1, chosen)

    def _round(self, states: Tensor, plan: RevealPlan, number: int) -> Tensor:
        """The states [B, L, V+1] after a round of the plan."""
        rows = plan.rows(number)
        fixed = number < plan.num_early or self.config.estimator == "reinforce"
        before = states[rows].detach() if fixed else states[rows]
        now, masked = plan.rounds[rows] == number, plan.rounds[rows] >= number
        reinforce = self.config.estimator == "reinforce"
        with torch.set_grad_enabled(torch.is_grad_enabled() and (not fixed or reinforce or number in self.measured)):
            log_probs = self._log_probs(self.model, before)
        step = plan.step_of(number)[rows]
        weight = self.until[self.last_step[rows] - 1] - self.until[step - 1]
        self.last_step[rows] = step
        reference = self._measure(number, rows, before, log_probs, masked, weight)
        noisy = log_probs + gumbel_like(log_probs, self.generator)
        tokens = noisy.argmax(-1)
        drawn = functional.one_hot(tokens, self.model.num_tokens).to(log_probs.dtype)
        self._count(rows, tokens, now, log_probs, reference)
        if not fixed:
            drawn = _straight_through(drawn, (noisy / self.config.temperature).softmax(-1))
        after = torch.where(now[..., None], functional.pad(drawn, (0, 1)), before)
        return states.index_copy(0, rows, after)

    def _measure(
        self, number: int, rows: Tensor, states: Tensor, log_probs: Tensor, masked: Tensor, weight: Tensor
    ) -> Tensor | None:
        """Add the KL of a round, if it is measured; returns log p_pre [R, L, V]."""
        if number not in self.measured:
            return None
        if states.requires_grad and not self.config.state_gradient:
            states = states.detach()
            log_probs = self._log_probs(self.model, states)
        if self.config.estimator == "reinforce":
            log_probs = log_probs.detach()
        reference = self._log_probs(self.pretrained, states)
        self.path_kl = self.path_kl.index_add(
            0, rows, self.scale * step_kl(log_probs, reference, masked, weight).to(self.path_kl.dtype)
        )
        return reference

    def _count(self, rows: Tensor, tokens: Tensor, now: Tensor, log_probs: Tensor, reference: Tensor | None) -> None:
        """Add the log-probability of the drawn tokens, and their log-ratio if the round is measured."""
        if self.config.estimator != "reinforce":
            log_probs = log_probs.detach()
        drawn = (log_probs.gather(-1, tokens[..., None]).squeeze(-1) * now).sum(-1)
        self.log_prob = self.log_prob.index_add(0, rows, drawn.to(self.log_prob.dtype))
        if reference is not None:
            ratio = (log_probs - reference).detach().gather(-1, tokens[..., None]).squeeze(-1)
            self.log_ratio[rows] += self.scale * (ratio * now).sum(-1).to(self.log_ratio.dtype)

    def _relaxed(self, states: Tensor, steps: Tensor, num_rounds: int) -> Rollout:
        """The last steps over V+1 relaxed outcomes a position, the mask among them, from hard `states` [B, L, V+1]."""
        rows = torch.arange(len(states), device=states.device)
        waited = self.until[self.last_step - 1] - self.until[self.truncation]
        for number, step in enumerate(range(self.truncation, 0, -1), start=num_rounds):
            unmask_prob, masked = self.unmask_probs[step - 1], states[..., -1:]
            log_probs = self._log_probs(self.model, states)
            self._measure(number, rows, states, log_probs, masked.squeeze(-1), unmask_prob + waited)
            waited = torch.zeros_like(waited)
            stay = (1 - unmask_prob).log().expand(*log_probs.shape[:-1], 1).to(log_probs)
            outcomes = torch.cat([log_probs + unmask_prob.log(), stay], -1)
            noisy = outcomes + gumbel_like(outcomes, self.generator)
            states = (1 - masked) * states + masked * (noisy / self.config.temperature).softmax(-1)
        soft = states[..., :-1]
        tokens, unknown = soft.argmax(-1), torch.full_like(self.log_prob, torch.nan)
        x0 = _straight_through(functional.one_hot(tokens, self.model.num_tokens).to(soft.dtype), soft)
        steps = torch.where(steps > self.truncation, steps, 0)
        return Rollout(x0, tokens, steps, self.path_kl, unknown, unknown)

    def _log_probs(self, model: TokenModel, states: Tensor) -> Tensor:
        if not self.config.checkpoint or not torch.is_grad_enabled():
            return model.log_probs(states)
        values = checkpoint(model.log_probs, states, use_reentrant=False)
        assert isinstance(values, Tensor)
        return values


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft`, exactly."""
    return hard + (soft - soft.detach())
