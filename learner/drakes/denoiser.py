"""The denoiser: for every masked position the law of its token given the visible ones (SUBS, MDLM, arXiv 2406.07524).

Absorbing noise makes the ideal denoiser independent of time. States are one-hot or relaxed, never indices, so that
gradients reach them. Shapes: B batch, L positions, V tokens (the mask is token V), H hidden.
"""

import copy
from typing import Protocol, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from learner.configs import StrictConfig
from learner.drakes.reverse_complement import reverse_complement_one_hot
from learner.networks.attention import Block, sinusoidal_positions
from learner.strands import NUM_BASES

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class DenoiserConfig(StrictConfig):
    """Size of a denoiser."""

    hidden_size: int = Field(64, ge=2, le=65536, multiple_of=2)
    """Width of the residual stream; even."""
    num_layers: int = Field(2, ge=1, le=64)
    """Blocks of attention and feed-forward."""
    num_heads: int = Field(4, ge=1, le=1024)
    """Attention heads; a divisor of hidden_size."""
    stem_kernel: int = Field(0, ge=0, le=255)
    """Odd width in positions of a residual convolution before the blocks, which finds motifs sooner where L >= 50 (as wide
    as the motifs); 0: none."""
    stem_channels: int = Field(0, ge=0, le=65536)
    """Above 0 the stem is two convolutions of this kernel: so many detectors of words on the letters, and one that tells
    the positions around what was found. Sites at any place train the same detectors. 0: one convolution."""
    masked_fraction: bool = False
    """Also tell the network which share of the positions is masked; not needed, as it sees them."""

    @model_validator(mode="after")
    def _shapes(self) -> "DenoiserConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.stem_kernel and self.stem_kernel % 2 == 0:
            raise ValueError(f"stem_kernel {self.stem_kernel} must be odd, or 0 for none")
        if self.stem_channels and not self.stem_kernel:
            raise ValueError(f"stem_channels {self.stem_channels} needs a stem: set stem_kernel")
        return self


class TokenModel(Protocol):
    """What sampling, likelihoods and fine-tuning need of a denoiser."""

    @property
    def num_tokens(self) -> int:
        """V."""

    @property
    def length(self) -> int:
        """L."""

    def log_probs(self, states: Tensor) -> Tensor:
        """float32 [B, L, V]: log p(token | visible tokens), which counts only at masked positions."""


class Denoiser(nn.Module):
    """A bidirectional transformer over [B, L, V+1]; starts as the uniform law, whose NLL is L log V nats."""

    def __init__(self, num_tokens: int, length: int, config: DenoiserConfig):
        super().__init__()
        hidden = config.hidden_size
        self.num_tokens, self.length, self.config = num_tokens, length, config
        self.embedding = nn.Linear(num_tokens + 1, hidden, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.positions: Tensor
        self.register_buffer("positions", sinusoidal_positions(length, hidden), persistent=False)
        self.fraction = nn.Linear(1, hidden, bias=False) if config.masked_fraction else None
        self.stem = _stem(num_tokens + 1, config) if config.stem_kernel else None
        self.blocks = nn.ModuleList(Block(hidden, config.num_heads, causal=False) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, num_tokens)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Logits [B, L, V] of `states` [B, L, V+1], one-hot or relaxed."""
        x = self._embed(states)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def log_probs(self, states: Tensor) -> Tensor:
        """float32 [B, L, V] (float64 for a float64 network); see `TokenModel`."""
        logits = self(states)
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

    def attention(self, states: Tensor) -> Tensor:
        """Attention weights [layers, B, heads, L, L] of `states` [B, L, V+1]."""
        x, weights = self._embed(states), []
        for block in self.blocks:
            assert isinstance(block, Block)
            weights.append(block.attention(x))
            x = block(x)
        return torch.stack(weights)

    def _embed(self, states: Tensor) -> Tensor:
        x = self.embedding(states) + self.positions
        if self.fraction is not None:
            x = x + self.fraction(states[..., -1].mean(-1, keepdim=True))[:, None]
        if self.stem is not None:
            x = x + self.stem(states.transpose(1, 2)).transpose(1, 2)
        return x


def _stem(num_channels: int, config: DenoiserConfig) -> nn.Sequential:
    """From states [B, V+1, L] to [B, H, L]."""
    hidden, kernel = config.hidden_size, config.stem_kernel
    detectors = nn.Conv1d(num_channels, config.stem_channels or hidden, kernel, padding=kernel // 2)
    if not config.stem_channels:
        return nn.Sequential(detectors, nn.GELU())
    nn.init.normal_(detectors.weight, std=0.2)
    return nn.Sequential(detectors, nn.GELU(), nn.Conv1d(config.stem_channels, hidden, kernel, padding=kernel // 2))


class SymmetricDenoiser(nn.Module):
    """p_sym(v at i | x) = ½ p(v at i | x) + ½ p(comp v at L-1-i | rc x): exactly equivariant, still normalised.

    Raises ValueError unless V = 4 (A C G T).
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        if denoiser.num_tokens != NUM_BASES:
            raise ValueError(f"only DNA has a reverse complement: got {denoiser.num_tokens} tokens, allowed: 4")
        self.denoiser = denoiser
        self.num_tokens, self.length = denoiser.num_tokens, denoiser.length

    def log_probs(self, states: Tensor) -> Tensor:
        """float32 [B, L, 4] of `states` [B, L, 5]; one pass over 2B sequences."""
        both = self.denoiser.log_probs(torch.cat([states, reverse_complement_one_hot(states)]))
        return symmetrised(*both.chunk(2))


def symmetrised(log_probs: Tensor, of_reverse_complement: Tensor) -> Tensor:
    """Mean in probability of log p [.., L, 4] of a state and of its reverse complement."""
    return torch.logaddexp(log_probs, reverse_complement_one_hot(of_reverse_complement)) - torch.log(torch.tensor(2.0))


def encode(tokens: Tensor, num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One-hot states [.., V+1] of int tokens [..] in 0..V."""
    return functional.one_hot(tokens.long(), num_tokens + 1).to(dtype)


def carry_over(log_probs: Tensor, states: Tensor) -> Tensor:
    """[B, L, V]: `log_probs` where `states` [B, L, V+1] (one-hot) are masked, else the point mass at the visible token."""
    return torch.where(states[..., -1:] > 0, log_probs, states[..., :-1].log())


def frozen_copy(model: AnyModule) -> AnyModule:
    """A copy in evaluation mode whose parameters take no gradient; gradients still pass through to its input."""
    return copy.deepcopy(model).eval().requires_grad_(False)
