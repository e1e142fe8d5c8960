"""The policy network: intended-action logits, log-flow and (optionally) backward logits for every prefix.

Shapes: B batch, T steps, A actions, N prefixes.
"""

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from learner.networks import NetworkConfig, build_network
from learner.networks.context import Context, ContextShape
from learner.networks.prefixes import PrefixState
from learner.space import SequenceSpace


class PolicyOutputs(NamedTuple):
    """What the policy network says of N prefixes."""

    log_policy: Tensor
    """float [N, A]: log pi(a|s), minus infinity where the space forbids the action."""
    log_flow: Tensor
    """float [N]: log F(s), meaningless at finished sequences."""
    backward_logits: Tensor | None
    """float [N, A]: unnormalised log P_B(a|s') of the action that led here, if the network has such a head."""
    lookahead_logits: Tensor | None
    """float [N, k, A]: logits of the next k realised tokens, if the network has such a head."""


class PolicyHeads(TypedDict):
    """What a policy network gives besides logits and flows."""

    backward_head: bool
    """Logits of P_B."""
    lookahead_steps: int
    """Realised tokens predicted ahead; 0: none."""
    own_log_z: bool
    """Whether log Z is a parameter of its own."""
    values: bool
    """Whether the flow output stands for values of reward seeking, which start at 0."""


class Policy(nn.Module):
    """pi(a|s), F(s), P_B(a|s') and look-ahead from one trunk.

    Starts as the uniform policy with the flows of a constant reward 1 (with `values`, all 0). With `own_log_z`, log F(s_0)
    = log Z is a parameter of its own (`log_z`, the offset of the start not included) instead of an output of the network;
    with windows, log Z of a window is the sum of both. Raises ValueError for a network that cannot read windows.
    """

    def __init__(
        self,
        space: SequenceSpace,
        config: NetworkConfig,
        *,
        backward_head: bool = False,
        lookahead_steps: int = 0,
        own_log_z: bool = False,
        values: bool = False,
        shape: ContextShape | None = None,
    ):
        super().__init__()
        self.space = space
        self._sizes = [space.num_actions, 1, space.num_actions * backward_head, space.num_actions * lookahead_steps]
        self.log_z = nn.Parameter(torch.zeros(1)) if own_log_z else None
        self.network = build_network(space, sum(self._sizes), config, shape)
        if shape is not None and not self.network.reads_windows:
            raise ValueError(f"network.name: {config.name} reads no windows of a time series; allowed: transformer")
        self.forbidden: Tensor
        self.register_buffer("forbidden", forbidden_actions(space), persistent=False)
        self.flow_offset: Tensor
        offset = torch.from_numpy(space.log_num_completions * (not values))
        self.register_buffer("flow_offset", offset, persistent=False)

    @property
    def thought_context(self) -> bool:
        """Whether it reads intended tokens besides the realised ones."""
        return self.network.thought_context

    def forward(self, symbols: Tensor, rows: Tensor, context: Context | None = None) -> PolicyOutputs:
        """Outputs of the prefixes at flat positions `rows` int64 [N] (b*(T+1) + t) of `symbols` int64 [B, T]."""
        return self._split(self.network(symbols, rows, context), rows % (self.space.max_length + 1))

    @torch.no_grad()
    def shift_log_flow(self, amount: Tensor) -> None:
        """Add `amount` float [] to log F of every prefix."""
        self.network.head.bias[self._sizes[0]] += amount
        if self.log_z is not None and not self.network.reads_windows:
            self.log_z.add_(amount)

    def start(self, context: Context | None = None) -> PrefixState:
        """The root, or that of each window, for one-step evaluation."""
        return self.network.start(context)

    def extend(self, state: PrefixState, parents: Tensor, symbols: Tensor) -> PrefixState:
        """The prefixes `parents[i]` followed by `symbols[i]`."""
        return self.network.extend(state, parents, symbols)

    def at(self, state: PrefixState) -> PolicyOutputs:
        """Outputs of the prefixes of `state`."""
        depth = torch.full((len(state),), state.depth, device=self.flow_offset.device)
        return self._split(self.network.outputs(state), depth)

    def _split(self, outputs: Tensor, depth: Tensor) -> PolicyOutputs:
        logits, flow, backward, lookahead = outputs.float().split(self._sizes, -1)
        flow = flow.squeeze(-1)
        if self.log_z is not None:
            own = self.log_z + flow if self.network.reads_windows else self.log_z
            flow = torch.where(depth == 0, own, flow)
        return PolicyOutputs(
            logits.masked_fill(self.forbidden[depth], -torch.inf).log_softmax(-1),
            flow + self.flow_offset[depth],
            backward if self._sizes[2] else None,
            lookahead.unflatten(-1, (-1, self._sizes[0])) if self._sizes[3] else None,
        )


def forbidden_actions(space: SequenceSpace) -> Tensor:
    """bool [T+1, A]: forbidden actions at each depth; none at depth T, where no action is taken."""
    forbidden = torch.zeros(space.max_length + 1, space.num_actions, dtype=torch.bool)
    forbidden[:-1] = torch.from_numpy(~space.allowed)
    return forbidden
