"""The policy network: intended-action logits, log-flow and (optionally) backward logits for every prefix.

Shapes: B batch, T steps, A actions, N prefixes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from learner.networks import NetworkConfig, build_network
from learner.networks.mlp import PrefixState
from learner.space import SequenceSpace


class PolicyOutputs(NamedTuple):
    """What the policy network says of N prefixes."""

    log_policy: Tensor
    """float [N, A]: log pi(a|s), minus infinity where the space forbids the action."""
    log_flow: Tensor
    """float [N]: log F(s), meaningless at finished sequences."""
    backward_logits: Tensor | None
    """float [N, A]: unnormalised log P_B(a|s') of the action that led here, if the network has such a head."""


class Policy(nn.Module):
    """pi(a|s), F(s) and P_B(a|s') from one trunk. Starts as the uniform policy with the flows of a constant reward 1."""

    def __init__(self, space: SequenceSpace, config: NetworkConfig, *, backward_head: bool):
        super().__init__()
        self.space, self.backward_head = space, backward_head
        self.network = build_network(space, space.num_actions * (1 + backward_head) + 1, config)
        self.forbidden: Tensor
        self.register_buffer("forbidden", forbidden_actions(space), persistent=False)
        self.flow_offset: Tensor
        self.register_buffer("flow_offset", torch.from_numpy(space.log_num_completions.copy()), persistent=False)

    def forward(self, tokens: Tensor, rows: Tensor) -> PolicyOutputs:
        """Outputs of the prefixes at flat positions `rows` int64 [N] (b*(T+1) + t) of `tokens` int64 [B, T]."""
        return self._split(self.network(tokens, rows), rows % (self.space.max_length + 1))

    def start(self) -> PrefixState:
        """The root, for one-step evaluation."""
        return self.network.start()

    def extend(self, state: PrefixState, parents: Tensor, tokens: Tensor) -> PrefixState:
        """The prefixes `parents[i]` followed by `tokens[i]`."""
        return self.network.extend(state, parents, tokens)

    def at(self, state: PrefixState) -> PolicyOutputs:
        """Outputs of the prefixes of `state`."""
        depth = torch.tensor(state.depth, device=self.flow_offset.device)
        return self._split(self.network.outputs(state), depth)

    def _split(self, outputs: Tensor, depth: Tensor) -> PolicyOutputs:
        actions, outputs = self.space.num_actions, outputs.float()
        logits = outputs[:, :actions].masked_fill(self.forbidden[depth], -torch.inf)
        backward = outputs[:, actions + 1 :] if self.backward_head else None
        return PolicyOutputs(logits.log_softmax(-1), outputs[:, actions] + self.flow_offset[depth], backward)


def forbidden_actions(space: SequenceSpace) -> Tensor:
    """bool [T+1, A]: forbidden actions at each depth; none at depth T, where no action is taken."""
    forbidden = torch.zeros(space.max_length + 1, space.num_actions, dtype=torch.bool)
    forbidden[:-1] = torch.from_numpy(~space.allowed)
    return forbidden
