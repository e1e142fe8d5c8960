"""The differentiable reward of fine-tuning: an ensemble that learns an oracle's rewards.

    R(x) = mean_e R_e(x) - κ · std_e R_e(x),   R_e(x) = (f_e(x) + f_e(rc x)) / 2,   in standardised rewards

Shapes: E members, B sequences, L positions, V = 4 letters (A C G T).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from learner.configs import StrictConfig
from learner.drakes.ensemble import EnsembleConfig, build_ensemble
from learner.drakes.labelled import LabelledRing, held_out
from learner.drakes.metrics import rank_correlation
from learner.drakes.reverse_complement import reverse_complement_one_hot

_SMALLEST_VARIANCE = 1e-12


class RewardModelConfig(StrictConfig):
    """The ensemble, and how it is trained."""

    num_members: int = Field(3, ge=1, le=64)
    """Networks in the ensemble."""
    network: EnsembleConfig = EnsembleConfig()
    """Their size."""
    rc_symmetric: bool = True
    """Whether both strands have the same reward; false for strand-specific assays."""
    pessimism: float = Field(0.0, ge=0, le=100)
    """κ: the ensemble's standard deviations that are taken off its mean."""
    pairwise_weight: float = Field(0.0, ge=0)
    """Weight of the logistic loss of the order of random pairs, beside the squared error."""
    learning_rate: float = Field(3e-3, gt=0)
    """Step size of Adam."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW)."""
    batch_size: int = Field(64, ge=2)
    """Sequences of each member's batch; every member draws its own."""
    warm_start_steps: int = Field(400, ge=0)
    """Steps on the offline data before fine-tuning."""
    recent_share: float = Field(0.25, ge=0, le=1)
    """Share of a batch that is drawn from the newest labels; the rest from all."""
    num_recent: int = Field(1000, ge=1)
    """Labels that count as the newest."""
    holdout_share: float = Field(0.1, ge=0, lt=1)
    """Share of all sequences (both strands together) that is never trained on."""
    capacity: int = Field(100_000, ge=1)
    """Labels kept for training; the oldest go first. As many again at most are held out."""


class RewardModel(nn.Module):
    """Predicts standardised rewards of one-hot, straight-through or relaxed sequences; differentiable in them."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: RewardModelConfig, length: int, *, seed: int):
        super().__init__()
        self.config, self.length = config, length
        generator = torch.Generator().manual_seed(seed)
        self.networks = build_ensemble(config.network, config.num_members, length, generator)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def members(self, x: Tensor) -> Tensor:
        """R_e [E, B] of `x` float [B, L, V], or of each member's own `x` [E, B, L, V]."""
        if x.dim() == 3:
            x = x.expand(self.config.num_members, *x.shape)
        if not self.config.rc_symmetric:
            return self.networks(x)
        forward, reverse = self.networks(torch.cat([x, reverse_complement_one_hot(x)], 1)).chunk(2, 1)
        return (forward + reverse) / 2

    def forward(self, x: Tensor) -> Tensor:
        """R [B], standardised, of `x` float [B, L, V]."""
        members = self.members(x)
        if self.config.pessimism == 0 or len(members) == 1:
            return members.mean(0)
        spread = members.var(0, correction=0).clamp(min=_SMALLEST_VARIANCE).sqrt()
        return members.mean(0) - self.config.pessimism * spread

    def set_scale(self, rewards: np.ndarray) -> None:
        """Standardise by the mean and standard deviation of `rewards` float [n], in the oracle's units, from now on.

        Raises ValueError unless they are finite and differ.
        """
        mean, std = float(np.mean(rewards, dtype=np.float64)), float(np.std(rewards, dtype=np.float64))
        if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
            raise ValueError(f"rewards cannot be standardised: mean {mean}, standard deviation {std}")
        self.mean.fill_(mean)
        self.std.fill_(std)

    def standardise(self, rewards: Tensor) -> Tensor:
        """Rewards in the oracle's units, as standard deviations from the mean; same shape."""
        return (rewards - self.mean) / self.std

    def in_oracle_units(self, standardised: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return standardised * self.std + self.mean

    def vector(self) -> np.ndarray:
        """A copy of its whole state, scale included, float32 [R]."""
        return torch.cat([tensor.reshape(-1) for tensor in self.state_dict().values()]).cpu().numpy()

    def load_vector(self, vector: np.ndarray) -> None:
        """Take over a `vector`; raises ValueError if it is that of another model."""
        state = self.state_dict()
        sizes = [tensor.numel() for tensor in state.values()]
        if vector.shape != (sum(sizes),):
            raise ValueError(f"{vector.size} values do not fit a reward model of {sum(sizes)}")
        parts = torch.tensor(vector).split(sizes)  # a copy: what Ray hands over cannot be written to
        self.load_state_dict({name: part.view_as(state[name]) for name, part in zip(state, parts, strict=True)})

    @torch.no_grad()
    def predict(self, tokens: np.ndarray, *, chunk: int = 4096) -> np.ndarray:
        """R float32 [n] of finished sequences `tokens` int [n, L], in the oracle's units."""
        parts = [
            self.in_oracle_units(self(one_hot(tokens[start : start + chunk], self.mean)))
            for start in range(0, len(tokens), chunk)
        ]
        return torch.cat(parts).float().cpu().numpy() if parts else np.zeros(0, dtype=np.float32)


def one_hot(tokens: np.ndarray, like: Tensor) -> Tensor:
    """[.., L, 4] of `tokens` int [.., L], with dtype and device of `like`."""
    indices = torch.from_numpy(tokens.astype(np.int64)).to(like.device)
    return functional.one_hot(indices, 4).to(like.dtype)


def reward_loss(predicted: Tensor, rewards: Tensor, *, pairwise_weight: float = 0.0) -> Tensor:
    """Squared error of `predicted` against `rewards` [E, B], plus the loss of each order of two neighbours in the batch.

    The second is -log σ((R_i - R_j) · sign(r_i - r_j)), as of Bradley & Terry (1952); ties count for nothing.
    """
    loss = (predicted - rewards).square().mean()
    if pairwise_weight == 0:
        return loss
    gap, order = predicted - predicted.roll(1, -1), (rewards - rewards.roll(1, -1)).sign()
    return loss + pairwise_weight * (functional.softplus(-gap * order) * order.abs()).mean()


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients to parameters, as for a generator's update; restored afterwards."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    training = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for part, mode in training:
            part.training = mode


class RewardTrainer:
    """Trains a reward model on labels that keep coming; knows how well it ranks those that it never trains on."""

    def __init__(self, model: RewardModel, *, seed: int):
        config = model.config
        self.model, self.config = model, config
        self.optimiser = torch.optim.AdamW(
            model.networks.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.labels = LabelledRing(config.capacity, model.length)
        self.held_out_labels = LabelledRing(config.capacity, model.length)
        self._rng = np.random.default_rng(seed)

    def add(self, tokens: np.ndarray, rewards: np.ndarray) -> int:
        """Take in oracle rewards float [n] of `tokens` int [n, L]; the number held out. NaN and infinite ones are dropped."""
        finite = np.isfinite(rewards)
        tokens, rewards = tokens[finite], rewards[finite]
        apart = held_out(tokens, self.config.holdout_share, rc_symmetric=self.config.rc_symmetric)
        self.labels.add(tokens[~apart], rewards[~apart])
        self.held_out_labels.add(tokens[apart], rewards[apart])
        return int(apart.sum())

    def warm_start(self, tokens: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """Set the scale by the offline labels, add them, and train `warm_start_steps` on them."""
        self.model.set_scale(rewards[np.isfinite(rewards)])
        self.add(tokens, rewards)
        metrics: dict[str, float] = {}
        for _ in range(self.config.warm_start_steps):
            metrics = self._step(recent_share=0.0)
        return metrics

    def step(self) -> dict[str, float]:
        """One step of every member on its own batch, partly of the newest labels; `reward_model_loss`."""
        return self._step(recent_share=self.config.recent_share)

    def _step(self, *, recent_share: float) -> dict[str, float]:
        config = self.config
        if not len(self.labels):
            raise ValueError("the reward model has no labels to train on")
        size = (config.num_members, config.batch_size)
        rows = self.labels.rows(size, self._rng, recent=config.num_recent, recent_share=recent_share)
        self.model.train()
        targets = self.model.standardise(torch.from_numpy(self.labels.rewards[rows]).to(self.model.mean))
        predicted = self.model.members(one_hot(self.labels.tokens[rows], self.model.mean))
        loss = reward_loss(predicted, targets, pairwise_weight=config.pairwise_weight)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.model.eval()
        return {"reward_model_loss": loss.item()}

    def holdout_correlation(self, count: int = 1000) -> float:
        """Spearman correlation of prediction and reward over the newest `count` held-out labels; NaN for fewer than 3."""
        tokens, rewards = self.held_out_labels.recent(count)
        return rank_correlation(self.model.predict(tokens), rewards) if len(rewards) >= 3 else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Model, optimiser, labels and random numbers."""
        return {
            "model": {name: tensor.clone() for name, tensor in self.model.state_dict().items()},
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "labels": self.labels.state_dict(),
            "held_out_labels": self.held_out_labels.state_dict(),
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; raises ValueError if it belongs to another model or capacity."""
        self.labels.load_state_dict(state["labels"])
        self.held_out_labels.load_state_dict(state["held_out_labels"])
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self._rng.bit_generator.state = state["rng"]
