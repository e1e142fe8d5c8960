"""What a network may know besides a prefix: the window of a time series that the prefix continues.

Linear embedding of feature vectors, sinusoidal positions, bidirectional blocks; the outputs of all steps and the window
itself are mapped to one vector, and that to one for each depth of a prefix. As the stream of intended tokens does, they join
the streams that a transformer's head reads; besides, every position of the other streams starts from its own.

Shapes: B prefixes or trajectories, n distinct windows, W steps of a window, F features of a step, T depths, H hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from learner.networks.attention import Block, sinusoidal_positions


class ContextShape(NamedTuple):
    """Size of a window."""

    num_steps: int
    """W."""
    num_features: int
    """F."""


class Context(NamedTuple):
    """Windows, and which of them each trajectory continues."""

    windows: Tensor
    """float [n, W, F]."""
    rows: Tensor
    """int64 [B]: row of `windows`."""


class WindowEncoder(nn.Module):
    """One vector for each window and depth."""

    def __init__(self, shape: ContextShape, num_depths: int, hidden: int, num_heads: int, num_layers: int):
        super().__init__()
        self.embedding = nn.Linear(shape.num_features, hidden)
        self.positions: Tensor
        self.register_buffer("positions", sinusoidal_positions(shape.num_steps, hidden), persistent=False)
        self.blocks = nn.ModuleList(Block(hidden, num_heads, causal=False) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden)
        self.pool = nn.Linear(shape.num_steps * hidden, hidden)
        self.shortcut = nn.Linear(shape.num_steps * shape.num_features, hidden, bias=False)
        self.depths = nn.Linear(hidden, num_depths * hidden)

    def forward(self, windows: Tensor) -> Tensor:
        """float [n, T, H] of windows float [n, W, F]."""
        x = self.embedding(windows) + self.positions
        for block in self.blocks:
            x = block(x)
        pooled = self.pool(self.norm(x).flatten(1)) + self.shortcut(windows.flatten(1))
        return self.depths(pooled).unflatten(1, (-1, pooled.shape[1]))


def single_context(window: Tensor) -> Context:
    """The context of one window float [W, F]."""
    return Context(window[None], torch.zeros(1, dtype=torch.int64, device=window.device))
