"""A multi-layer perceptron over prefixes whose first layer is a running sum of embeddings.

The first layer of an MLP on a flattened one-hot prefix is a sum of one embedding a position, so all prefixes of a
sequence cost one gather and one cumulative sum, and a rollout step adds one embedding. Position-specific embeddings of
the k-mers that end at a position join the same sum. Further hidden layers are residual: x + relu(Wx + b).

Shapes: B batch, T steps, N prefixes, A actions, E embedding, H hidden, O outputs.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from learner.configs import StrictConfig
from learner.networks.context import Context
from learner.networks.prefixes import PrefixNetwork
from learner.space import SequenceSpace

MAX_EMBEDDINGS = 250_000
MAX_AUTO_KMERS = 4096


class MLPConfig(StrictConfig):
    """Size of a prefix MLP."""

    name: Literal["mlp"] = "mlp"
    """Kind of network."""
    hidden_size: int = Field(256, ge=1, le=65536)
    """Units a hidden layer."""
    num_layers: int = Field(3, ge=1, le=32)
    """Hidden layers, the embedding layer included."""
    embedding_size: int | None = Field(32, ge=1, le=65536)
    """Width of the embeddings, which a matrix maps to the first hidden layer; null: that of the layer, and no matrix. A
    narrow one makes room for longer k-mers."""
    kmer_sizes: Literal["auto"] | tuple[Annotated[int, Field(ge=2, le=12)], ...] = "auto"
    """Lengths of the position-specific k-mer embeddings in the first layer; [] for none; auto: all k >= 2 with at most
    4,096 different k-mers (2 to 6 for DNA) while the table stays below 250,000 rows. Those longer than the sequence are
    left out."""


@dataclass(frozen=True)
class MLPState:
    """N prefixes of one depth, in the form that a rollout extends token by token."""

    running_sum: Tensor
    """float [N, E]: sum of the embeddings so far."""
    recent: Tensor
    """int64 [N, k_max - 1]: last tokens, newest last."""
    depth: int

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.running_sum.device

    def __len__(self) -> int:
        return len(self.running_sum)

    def select(self, rows: slice) -> "MLPState":
        """Some of the prefixes."""
        return MLPState(self.running_sum[rows], self.recent[rows], self.depth)


class PrefixMLP(PrefixNetwork):
    """Outputs [.., O] for prefixes of sequences in `space`; the last layer starts at zero."""

    def __init__(self, space: SequenceSpace, num_outputs: int, config: MLPConfig):
        super().__init__()
        self.num_steps, self.num_actions = space.max_length, space.num_actions
        self.kmer_sizes = (1, *_kmer_sizes(space, config))
        sizes = [self.num_steps * self.num_actions**k for k in self.kmer_sizes]
        if sum(sizes) > MAX_EMBEDDINGS:
            raise ValueError(
                f"network.kmer_sizes {self.kmer_sizes[1:]} need {sum(sizes):,} embeddings for {self.num_actions} actions and "
                f"length {self.num_steps}; at most {MAX_EMBEDDINGS:,} are allowed: use smaller sizes or []"
            )
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        hidden, width = config.hidden_size, config.embedding_size or config.hidden_size
        self.embedding = nn.Parameter(torch.zeros(sum(sizes), width))
        nn.init.normal_(self.embedding.data[: sizes[0]], std=self.num_steps**-0.5)
        self.widen = nn.Identity() if config.embedding_size is None else nn.Linear(width, hidden)
        self.position_bias = nn.Parameter(torch.empty(self.num_steps + 1, width))
        nn.init.normal_(self.position_bias, std=0.1)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(config.num_layers - 1))
        self.head = nn.Linear(hidden, num_outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.starts: Tensor
        self.within: Tensor
        within = np.array(self.kmer_sizes) <= np.arange(1, self.num_steps + 1)[:, None]
        starts = within.sum(1).cumsum() - within.sum(1)
        self.register_buffer("within", torch.from_numpy(np.flatnonzero(within)), persistent=False)
        self.register_buffer("starts", torch.from_numpy(starts), persistent=False)

    def forward(self, symbols: Tensor, rows: Tensor, context: Context | None = None) -> Tensor:
        """Outputs [N, O] of the prefixes at flat positions `rows` int64 [N] (b*(T+1) + t) of `symbols` int64 [B, T]."""
        batch, steps = symbols.shape
        kmers = self._kmers(symbols, torch.arange(steps, device=symbols.device), self.kmer_sizes)
        inside = kmers.view(batch, -1).index_select(1, self.within)  # no k-mer starts before the sequence
        bags = torch.arange(batch, device=symbols.device)[:, None] * inside.shape[1] + self.starts
        embedded = self._embed(inside.flatten(), bags.flatten()).view(batch, steps, -1)
        sums = nn.functional.pad(embedded.cumsum(1), (0, 0, 1, 0)) + self.position_bias
        return self._dense(sums.view(batch * (steps + 1), -1).index_select(0, rows))

    def start(self, context: Context | None = None) -> MLPState:
        """The root; with a context, once for each window."""
        device, count = self.embedding.device, 1 if context is None else len(context.windows)
        recent = torch.zeros(count, max(self.kmer_sizes) - 1, dtype=torch.int64, device=device)
        return MLPState(torch.zeros(count, self.embedding.shape[1], device=device), recent, 0)

    def extend(self, state: MLPState, parents: Tensor, symbols: Tensor) -> MLPState:
        """The prefixes `parents[i]` int64 [N'] followed by `symbols[i]` int64 [N']."""
        window = torch.cat([state.recent[parents], symbols[:, None]], 1)
        sizes = tuple(k for k in self.kmer_sizes if k <= state.depth + 1)
        added = self._embed(self._kmers(window, torch.tensor([state.depth], device=window.device), sizes)[:, -1])
        return MLPState(state.running_sum[parents] + added, window[:, 1:], state.depth + 1)

    def outputs(self, state: MLPState) -> Tensor:
        """[N, O]; equal to `forward` on the same prefixes."""
        return self._dense(state.running_sum + self.position_bias[state.depth])

    def _dense(self, sums: Tensor) -> Tensor:
        x = torch.relu(self.widen(sums))
        for layer in self.hidden:
            x = x + torch.relu(layer(x))
        return self.head(x)

    def _embed(self, kmers: Tensor, bags: Tensor | None = None) -> Tensor:
        """Sums of rows of the table; its gradient is sparse, and `FlatParameters` adds it to the dense one in place."""
        return nn.functional.embedding_bag(kmers, self.embedding, bags, mode="sum", sparse=True)

    def _kmers(self, tokens: Tensor, positions: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Embedding rows int64 [n, w, K] of the k-mers of `sizes` that end at each of `tokens` int64 [n, w].

        `positions` int64 [w] or [1]: where they are in the sequence. Rows of k-mers that start before `tokens` mean nothing.
        """
        width, columns, codes = tokens.shape[1], [], torch.zeros_like(tokens)
        for lag in range(max(sizes)):
            shifted = tokens if lag == 0 else nn.functional.pad(tokens[:, : width - lag], (lag, 0))
            codes = codes + shifted * self.num_actions**lag
            if lag + 1 in sizes:
                offset = self.offsets[self.kmer_sizes.index(lag + 1)]
                columns.append(offset + positions * self.num_actions ** (lag + 1) + codes)
        return torch.stack(columns, -1)


def _kmer_sizes(space: SequenceSpace, config: MLPConfig) -> list[int]:
    if config.kmer_sizes != "auto":
        return sorted({k for k in config.kmer_sizes if k <= space.max_length})
    sizes, rows = [], space.max_length * space.num_actions
    for k in range(2, space.max_length + 1):
        rows += space.max_length * space.num_actions**k
        if space.num_actions**k > MAX_AUTO_KMERS or rows > MAX_EMBEDDINGS:
            break
        sizes.append(k)
    return sizes
