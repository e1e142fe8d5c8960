"""Pretraining of a denoiser on known sequences by the NELBO, with averaged weights (MDLM, arXiv 2406.07524)."""

import copy
import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from learner.configs import StrictConfig
from learner.drakes.denoiser import Denoiser
from learner.drakes.diffusion import Estimator, nelbo
from learner.drakes.reverse_complement import reverse_complement_tokens
from learner.flat import FlatParameters
from learner.schedules import learning_rate_factor
from learner.strands import NUM_BASES


class PretrainingConfig(StrictConfig):
    """Optimisation of a denoiser on known sequences."""

    batch_size: int = Field(512, ge=1)
    """Sequences a step."""
    num_steps: int = Field(5000, ge=1)
    """Length of the learning-rate schedule."""
    learning_rate: float = Field(3e-3, gt=0, le=1)
    """Largest step size of AdamW."""
    final_learning_rate: float = Field(0.0, ge=0, le=1)
    """Share of it that the half cosine ends at."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """Longer gradients are cut to this L2 norm."""
    average_decay: float = Field(0.999, ge=0, lt=1)
    """Decay a step of the averaged weights; 0: no averaging."""
    estimator: Estimator = "count"
    """NELBO estimator: count (a uniform number of masks), harmonic (few masks more often, all tokens of equal weight) or
    time."""
    reverse_complement_probability: float = Field(0.0, ge=0, le=1)
    """Share of training sequences replaced by their other strand; DNA only, and not for strand-specific data."""


class Pretrainer:
    """Trains `denoiser` in place, one batch a call.

    Raises ValueError if `reverse_complement_probability` is positive and the alphabet is not of four tokens.
    """

    def __init__(self, denoiser: Denoiser, config: PretrainingConfig, *, seed: int = 0):
        if config.reverse_complement_probability and denoiser.num_tokens != NUM_BASES:
            raise ValueError(
                f"reverse_complement_probability {config.reverse_complement_probability} needs DNA, "
                f"but the alphabet has {denoiser.num_tokens} tokens: set it to 0"
            )
        self.denoiser, self.config, self.num_steps = denoiser, config, 0
        self.weights = FlatParameters(denoiser)
        self.averaged = self.weights.vector.detach().clone()
        self.optimiser = torch.optim.AdamW(
            [self.weights.vector],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.generator = torch.Generator(self.averaged.device).manual_seed(seed)

    def step(self, tokens: Tensor) -> dict[str, float]:
        """One update on `tokens` int64 [B, L] in 0..V-1.

        Returns nelbo and nelbo_per_token (nats), gradient_norm and learning_rate.
        """
        config = self.config
        rate = config.learning_rate * learning_rate_factor(
            self.num_steps, config.num_steps, warmup=config.warmup_steps, final=config.final_learning_rate
        )
        self.optimiser.param_groups[0]["lr"] = rate
        self.weights.zero_grad()
        loss = nelbo(self.denoiser, self._augmented(tokens), self.generator, estimator=config.estimator).mean()
        loss.backward()
        norm = self.weights.clip_gradient(config.max_gradient_norm)
        self.optimiser.step()
        self.num_steps += 1
        self._average()
        value = float(loss.detach())
        return {
            "nelbo": value,
            "nelbo_per_token": value / tokens.shape[1],
            "gradient_norm": float(norm),
            "learning_rate": rate,
        }

    def draw(self, data: Tensor) -> Tensor:
        """A batch [B, L] of `data` [n, L], with replacement."""
        rows = torch.randint(len(data), (self.config.batch_size,), generator=self.generator, device=data.device)
        return data[rows]

    def averaged_denoiser(self) -> Denoiser:
        """A copy with the averaged weights, from which fine-tuning starts and which is its fixed reference."""
        model = copy.deepcopy(self.denoiser)
        torch.nn.utils.vector_to_parameters(self.averaged.clone(), model.parameters())
        return model

    def uniform_nelbo(self) -> float:
        """L log V nats: that of an untrained denoiser."""
        return self.denoiser.length * math.log(self.denoiser.num_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, the data not included."""
        return {
            "weights": self.weights.vector.detach().clone(),
            "averaged": self.averaged.clone(),
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "num_steps": self.num_steps,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the trainer whose `state_dict` this is."""
        self.weights.load(state["weights"])
        self.averaged.copy_(state["averaged"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self.num_steps = state["num_steps"]
        self.generator.set_state(state["generator"])

    def _augmented(self, tokens: Tensor) -> Tensor:
        probability = self.config.reverse_complement_probability
        if not probability:
            return tokens
        chosen = torch.rand(len(tokens), 1, generator=self.generator, device=tokens.device) < probability
        return torch.where(chosen, reverse_complement_tokens(tokens), tokens)

    def _average(self) -> None:
        """Exponential moving average with the usual correction while it is young."""
        decay = min(self.config.average_decay, self.num_steps / (self.num_steps + 9))
        self.averaged.lerp_(self.weights.vector.detach(), 1 - decay)
