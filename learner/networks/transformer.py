"""A causal transformer over prefixes, with a cache of keys and values for rollouts and optional contexts.

Vaswani et al. 2017 (arXiv 1706.03762) with pre-norm blocks (Xiong et al. 2020, 2002.04745) and learned positions.
The thought context is a second stream over the *intended* tokens, shifted like the first: at step t it has seen
a_0..a_{t-1}; its last layer is concatenated to that of the realised tokens. A window of a time series joins in the same
way (`WindowEncoder`), and besides is what every position of the streams starts from.

Shapes: B batch, T steps, N prefixes, A actions, H hidden, O outputs, L layers, heads x D = H, t depth.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from learner.configs import StrictConfig
from learner.networks.attention import Block
from learner.networks.context import Context, ContextShape, WindowEncoder
from learner.networks.prefixes import PrefixNetwork
from learner.space import SequenceSpace


class TransformerConfig(StrictConfig):
    """Size of a prefix transformer."""

    name: Literal["transformer"]
    """Kind of network."""
    hidden_size: int = Field(128, ge=1, le=65536)
    """Width of the residual stream."""
    num_layers: int = Field(2, ge=1, le=64)
    """Blocks of attention and feed-forward."""
    num_heads: int = Field(4, ge=1, le=1024)
    """Attention heads; a divisor of hidden_size."""
    thought_context: bool = False
    """Also read the intended tokens, through a stream of their own."""
    num_thought_layers: int = Field(1, ge=1, le=64)
    """Blocks of that stream."""
    num_window_layers: int = Field(1, ge=0, le=64)
    """Blocks of the encoder of windows (generator.name forecast)."""

    @model_validator(mode="after")
    def _divisible(self) -> "TransformerConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        return self


@dataclass(frozen=True)
class StreamState:
    """A stream at N prefixes of one depth t."""

    hidden: Tensor
    """float [N, H]: last layer at the newest position."""
    caches: tuple[Tensor, ...]
    """L tensors float [2, N, heads, t+1, D]: keys and values so far."""

    def select(self, rows: slice | Tensor) -> "StreamState":
        """Some of the prefixes."""
        return StreamState(self.hidden[rows], tuple(cache[:, rows] for cache in self.caches))


@dataclass(frozen=True)
class TransformerState:
    """N prefixes of one depth, as each stream sees them."""

    streams: tuple[StreamState, ...]
    depth: int
    window: Tensor | None = None
    """float [N, T+1, H]: the encoded window that each prefix continues."""

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.streams[0].hidden.device

    def __len__(self) -> int:
        return len(self.streams[0].hidden)

    def select(self, rows: slice) -> "TransformerState":
        """Some of the prefixes."""
        streams = tuple(stream.select(rows) for stream in self.streams)
        return TransformerState(streams, self.depth, None if self.window is None else self.window[rows])


class CausalStream(nn.Module):
    """Embedding, blocks and final norm over one string of tokens; position t stands for the prefix of length t."""

    def __init__(self, num_tokens: int, max_length: int, hidden: int, num_heads: int, num_layers: int):
        super().__init__()
        self.beginning = num_tokens
        self.embedding = nn.Parameter(torch.empty(num_tokens + 1, hidden))
        self.positions = nn.Parameter(torch.empty(max_length + 1, hidden))
        for table in (self.embedding, self.positions):
            nn.init.normal_(table, std=0.5)
        self.blocks = nn.ModuleList(Block(hidden, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden)

    def _embed(self, tokens: Tensor, window: Tensor | None) -> Tensor:
        padded = functional.pad(tokens, (1, 0), value=self.beginning)
        x = self.embedding[padded] + self.positions[: padded.shape[1]]
        return x if window is None else x + window

    def forward(self, tokens: Tensor, window: Tensor | None = None) -> Tensor:
        """[B, T+1, H] of all prefixes of `tokens` int64 [B, T], which continue the encoded `window` float [B, T+1, H]."""
        x = self._embed(tokens, window)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def start(self, window: Tensor | None = None) -> StreamState:
        """The root, or that of each encoded `window` float [n, T+1, H]."""
        x = self.embedding[self.beginning : self.beginning + 1] + self.positions[:1]
        return self._step(x if window is None else x + window[:, 0], None)

    def extend(
        self, state: StreamState, parents: Tensor, tokens: Tensor, depth: int, window: Tensor | None = None
    ) -> StreamState:
        """The prefixes `parents` [N'] of `state` followed by `tokens` [N'], which makes `depth` tokens."""
        kept = len(parents) == len(state.hidden) and bool((parents.diff() == 1).all())  # each prefix has one child
        caches = state.caches if kept else tuple(cache.index_select(1, parents) for cache in state.caches)
        x = self.embedding[tokens] + self.positions[depth]
        return self._step(x if window is None else x + window[:, depth], caches)

    def _step(self, x: Tensor, caches: tuple[Tensor, ...] | None) -> StreamState:
        x, grown = x[:, None], []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x, cache = block.step(x, None if caches is None else caches[number])
            grown.append(cache)
        return StreamState(self.norm(x)[:, 0], tuple(grown))

    def attention(self, tokens: Tensor) -> Tensor:
        """Attention weights [L, B, heads, T+1, T+1]."""
        x, weights = self._embed(tokens, None), []
        for block in self.blocks:
            assert isinstance(block, Block)
            weights.append(block.attention(x))
            x = block(x)
        return torch.stack(weights)


class PrefixTransformer(PrefixNetwork):
    """Outputs [.., O] for prefixes of sequences in `space`; the last layer starts at zero."""

    def __init__(
        self, space: SequenceSpace, num_outputs: int, config: TransformerConfig, shape: ContextShape | None = None
    ):
        """With a `shape`, it reads windows of that shape."""
        super().__init__()
        self.thought_context, self.num_actions = config.thought_context, space.num_actions
        depths = [config.num_layers, config.num_thought_layers][: 1 + config.thought_context]
        size = (space.num_actions, space.max_length, config.hidden_size, config.num_heads)
        self.streams = nn.ModuleList(CausalStream(*size, depth) for depth in depths)
        self.reads_windows = shape is not None
        self.encoder = None
        if shape is not None:
            heads, layers = config.num_heads, config.num_window_layers
            self.encoder = WindowEncoder(shape, space.max_length + 1, config.hidden_size, heads, layers)
        self.head = nn.Linear(config.hidden_size * (len(depths) + self.reads_windows), num_outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, symbols: Tensor, rows: Tensor, context: Context | None = None) -> Tensor:
        """Outputs [N, O] of the prefixes at flat positions `rows` int64 [N] (b*(T+1) + t) of `symbols` int64 [B, T]."""
        window = None
        if self.encoder is not None:
            window = self._encode(context)[_given(context).rows, : symbols.shape[1] + 1]
        hidden = [
            stream(tokens, window).flatten(0, 1).index_select(0, rows) for stream, tokens in self._strings(symbols)
        ]
        if window is not None:
            hidden.append(window.flatten(0, 1).index_select(0, rows))
        return self.head(torch.cat(hidden, -1))

    def start(self, context: Context | None = None) -> TransformerState:
        """The root, or that of each window."""
        window = None if self.encoder is None else self._encode(context)
        return TransformerState(tuple(self._stream(i).start(window) for i in range(len(self.streams))), 0, window)

    def extend(self, state: TransformerState, parents: Tensor, symbols: Tensor) -> TransformerState:
        """The prefixes `parents[i]` int64 [N'] followed by `symbols[i]` int64 [N']."""
        depth, window = state.depth + 1, None if state.window is None else state.window[parents]
        pairs = zip(self._strings(symbols), state.streams, strict=True)
        streams = tuple(stream.extend(old, parents, tokens, depth, window) for (stream, tokens), old in pairs)
        return TransformerState(streams, depth, window)

    def outputs(self, state: TransformerState) -> Tensor:
        """[N, O]; equal to `forward` on the same prefixes."""
        hidden = [stream.hidden for stream in state.streams]
        return self.head(torch.cat(hidden if state.window is None else [*hidden, state.window[:, state.depth]], -1))

    def _encode(self, context: Context | None) -> Tensor:
        """float [n, T+1, H] of the windows."""
        assert self.encoder is not None
        return self.encoder(_given(context).windows)

    def attention(self, symbols: Tensor) -> list[Tensor]:
        """Attention weights [L, B, heads, T+1, T+1] of each stream; position 0 is the beginning, t the t-th token."""
        return [stream.attention(tokens) for stream, tokens in self._strings(symbols)]

    def _stream(self, number: int) -> CausalStream:
        stream = self.streams[number]
        assert isinstance(stream, CausalStream)
        return stream

    def _strings(self, symbols: Tensor) -> list[tuple[CausalStream, Tensor]]:
        """Each stream with what it reads of `symbols`."""
        if not self.thought_context:
            return [(self._stream(0), symbols)]
        return [(self._stream(0), symbols // self.num_actions), (self._stream(1), symbols % self.num_actions)]


def _given(context: Context | None) -> Context:
    assert context is not None, "this network reads windows"
    return context
