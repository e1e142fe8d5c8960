"""Tells generated sequences from real ones: the adversary of fine-tuning (Goodfellow et al. 2014, arXiv 1406.2661).

Shapes: B sequences, L positions, V = 4 letters (A C G T).
"""

import copy
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from learner.configs import StrictConfig
from learner.drakes.ensemble import EnsembleConfig, build_ensemble
from learner.drakes.losses import discriminator_loss, gradient_penalty
from learner.drakes.reverse_complement import reverse_complement_one_hot

_BETAS = (0.5, 0.99)


class DiscriminatorConfig(StrictConfig):
    """The adversary, and how it is trained."""

    network: EnsembleConfig = EnsembleConfig()
    """Its size."""
    learning_rate: float = Field(1e-3, gt=0)
    """Step size of Adam; at least the generator's."""
    real_label: float = Field(0.9, gt=0.5, le=1)
    """Label of real sequences: below 1, one-sided smoothing."""
    gradient_penalty: float = Field(0.1, ge=0)
    """γ of the penalty γ/2 · E||∂d/∂x||² on real sequences (R1)."""
    rc_symmetric: bool = True
    """Whether a real sequence may be shown as its reverse complement, with probability 1/2."""


class Discriminator(nn.Module):
    """A small network with a logit d, positive for real sequences, and its own optimiser."""

    def __init__(self, config: DiscriminatorConfig, length: int, *, seed: int):
        super().__init__()
        self.config = config
        self._generator = torch.Generator().manual_seed(seed)
        self.network = build_ensemble(config.network, 1, length, self._generator)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, betas=_BETAS)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B] of one-hot or straight-through `x` float [B, L, V]."""
        return self.network(x[None])[0]

    def step(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        """Train on one-hots `real` float [B, L, V] and `fake` [B', L, V], which gets no gradient.

        `discriminator_loss` is without the penalty; `discriminator_accuracy` weighs both kinds the same.
        """
        config = self.config
        if config.rc_symmetric:
            flipped = torch.rand(len(real), 1, 1, generator=self._generator).to(real.device) < 0.5
            real = torch.where(flipped, reverse_complement_one_hot(real), real)
        real = real.detach().requires_grad_(config.gradient_penalty > 0)
        on_real, on_fake = self(real), self(fake.detach())
        loss = discriminator_loss(on_real, on_fake, real_label=config.real_label)
        penalty = gradient_penalty(on_real, real) if config.gradient_penalty else loss.new_zeros(())
        self.optimiser.zero_grad()
        (loss + config.gradient_penalty * penalty).backward(inputs=list(self.network.parameters()))
        self.optimiser.step()
        accuracy = ((on_real > 0).double().mean() + (on_fake < 0).double().mean()) / 2
        return {
            "discriminator_loss": loss.item(),
            "discriminator_accuracy": accuracy.item(),
            "discriminator_penalty": penalty.item(),
        }

    def training_state(self) -> dict[str, Any]:
        """Network, optimiser and random numbers, for a checkpoint."""
        return {
            "network": {name: tensor.clone() for name, tensor in self.network.state_dict().items()},
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "generator": self._generator.get_state(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self._generator.set_state(state["generator"])
