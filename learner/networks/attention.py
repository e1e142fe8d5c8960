"""What all transformers here are made of: the attention block and sinusoidal positions.

Vaswani et al. 2017 (arXiv 1706.03762) with pre-norm blocks (Xiong et al. 2020, 2002.04745).

Shapes: B batch, t positions, N prefixes, H hidden, heads x D = H.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-norm self-attention, causal or bidirectional, and feed-forward."""

    def __init__(self, hidden: int, num_heads: int, *, causal: bool = True):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.project = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.feed_forward = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def _heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values [3, B, heads, t, D] of x [B, t, H]."""
        batch, steps, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, steps, 3, self.num_heads, -1)
        return qkv.permute(2, 0, 3, 1, 4)

    def _residual(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.feed_forward_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        """[B, t, H] -> [B, t, H]."""
        queries, keys, values = self._heads(x)
        return self._residual(x, functional.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal))

    def step(self, x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        """The newest position x [N, 1, H] after those in `cache`; returns [N, 1, H] and the cache with it."""
        heads = self._heads(x)
        cache = heads[1:] if cache is None else torch.cat([cache, heads[1:]], -2)
        return self._residual(x, functional.scaled_dot_product_attention(heads[0], cache[0], cache[1])), cache

    def attention(self, x: Tensor) -> Tensor:
        """Attention weights [B, heads, t, t]; each row is what one position reads of those that it may see."""
        queries, keys, _ = self._heads(x)
        scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
        if not self.causal:
            return scores.softmax(-1)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)


def sinusoidal_positions(length: int, hidden: int) -> Tensor:
    """float32 [length, H]: sin and cos of position / 10000^(2j/H) in even and odd columns (1706.03762, section 3.5).

    Raises ValueError for an odd width.
    """
    if hidden % 2:
        raise ValueError(f"hidden_size {hidden} must be even for sinusoidal positions")
    rates = torch.exp(torch.arange(0, hidden, 2) * (-math.log(10_000.0) / hidden))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
