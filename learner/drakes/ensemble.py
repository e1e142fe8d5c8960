"""E small networks side by side: their weights are stacked, so that a layer of all of them is one batched product.

They read one-hot, straight-through or relaxed sequences, and are differentiable in them.
Shapes: E members, B sequences, L positions, V letters, H hidden units, C channels.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from learner.configs import StrictConfig


class EnsembleConfig(StrictConfig):
    """Size of the networks of an ensemble."""

    kind: Literal["cnn", "mlp"] = "cnn"
    """cnn: convolutions, then mean and maximum over positions; mlp: reads all positions at once, which took more labels to
    rank as well, also at length 8."""
    hidden_size: int = Field(64, ge=1, le=4096)
    """Units a hidden layer, and channels of the convolutions."""
    num_layers: int = Field(0, ge=0, le=8)
    """Residual layers after the first: of a cnn, convolutions of three positions."""
    kernel_size: int = Field(9, ge=1, le=63)
    """Positions under the first convolution of a cnn; odd."""

    @model_validator(mode="after")
    def _odd(self) -> "EnsembleConfig":
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {self.kernel_size}; allowed: odd numbers")
        return self


class EnsembleLinear(nn.Module):
    """A linear layer for every member: [E, N, in] to [E, N, out]."""

    def __init__(self, num_members: int, num_in: int, num_out: int, *, generator: torch.Generator, gain: float = 1.0):
        super().__init__()
        weight = torch.randn(num_members, num_in, num_out, generator=generator) * (gain / num_in**0.5)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(num_members, 1, num_out))

    def forward(self, x: Tensor) -> Tensor:
        """[E, N, out] of `x` [E, N, in]."""
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleMLP(nn.Module):
    """Multi-layer perceptrons of the flattened sequence; hidden layers after the first are residual."""

    def __init__(self, config: EnsembleConfig, num_members: int, length: int, generator: torch.Generator):
        super().__init__()
        hidden = config.hidden_size
        self.first = EnsembleLinear(num_members, 4 * length, hidden, generator=generator, gain=2.0)
        self.hidden = nn.ModuleList(
            EnsembleLinear(num_members, hidden, hidden, generator=generator) for _ in range(config.num_layers)
        )
        self.head = EnsembleLinear(num_members, hidden, 1, generator=generator, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[E, B] of `x` [E, B, L, V]."""
        h = functional.silu(self.first(x.flatten(2)))
        for layer in self.hidden:
            h = h + functional.silu(layer(h))
        return self.head(h).squeeze(-1)


class EnsembleConv(nn.Module):
    """A convolution for every member that keeps the length, zero-padded: [E, B, L, in] to [E, B, L, out]."""

    def __init__(self, num_members: int, num_in: int, num_out: int, size: int, *, generator: torch.Generator):
        super().__init__()
        self.size = size
        self.linear = EnsembleLinear(num_members, num_in * size, num_out, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[E, B, L, out] of `x` [E, B, L, in]."""
        members, batch, length, _ = x.shape
        side = self.size // 2
        windows = functional.pad(x, (0, 0, side, side)).unfold(2, self.size, 1)
        return self.linear(windows.reshape(members, batch * length, -1)).view(members, batch, length, -1)


class EnsembleCNN(nn.Module):
    """Convolutional networks: one wide convolution, residual ones of three positions, mean and maximum, two dense layers."""

    def __init__(self, config: EnsembleConfig, num_members: int, generator: torch.Generator):
        super().__init__()
        hidden = config.hidden_size
        self.first = EnsembleConv(num_members, 4, hidden, config.kernel_size, generator=generator)
        self.hidden = nn.ModuleList(
            EnsembleConv(num_members, hidden, hidden, 3, generator=generator) for _ in range(config.num_layers)
        )
        self.dense = EnsembleLinear(num_members, 2 * hidden, hidden, generator=generator)
        self.head = EnsembleLinear(num_members, hidden, 1, generator=generator, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[E, B] of `x` [E, B, L, V]."""
        h = functional.silu(self.first(x))
        for layer in self.hidden:
            h = h + functional.silu(layer(h))
        pooled = torch.cat([h.mean(2), h.amax(2)], -1)
        return self.head(functional.silu(self.dense(pooled))).squeeze(-1)


def build_ensemble(config: EnsembleConfig, num_members: int, length: int, generator: torch.Generator) -> nn.Module:
    """The networks that `config` asks for, for sequences of `length`: [E, B, L, V] to [E, B]."""
    if config.kind == "mlp":
        return EnsembleMLP(config, num_members, length, generator)
    return EnsembleCNN(config, num_members, generator)
