"""The learned dynamics P̂(x | s, a): which token the environment realises when the policy intends one.

Shapes: B batch, T steps, A actions, N prefixes.
"""

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from learner.configs import StrictConfig
from learner.networks import MLPConfig, NetworkConfig, build_network
from learner.networks.context import Context, ContextShape
from learner.networks.prefixes import PrefixState
from learner.policy import forbidden_actions
from learner.space import SequenceSpace


class DynamicsConfig(StrictConfig):
    """How the dynamics model is built and trained."""

    mode: Literal["off_policy", "on_policy"] = "off_policy"
    """Train on replayed (prefix, intended, realised) triples, or on the batch that also trains the policy."""
    num_rounds: int = Field(1, ge=1, le=100)
    """off_policy: gradient steps of the dynamics model in each learner step."""
    batch_size: int = Field(128, ge=1, le=1_000_000)
    """off_policy: trajectories in each of these steps; every step of each gives one triple."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Adam step size of the dynamics model."""
    network: NetworkConfig = MLPConfig(hidden_size=64, num_layers=2, kmer_sizes=())
    """Its trunk; separate from the policy's."""

    @field_validator("network", mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        """What is not said of an MLP here is as above, not as for the policy."""
        if isinstance(value, dict) and value.get("name", "mlp") == "mlp":
            return cls.model_fields["network"].default.model_dump() | value
        return value


class DynamicsModel(nn.Module):
    """log P̂(x|s,a) for all A actions in one pass: the head gives an [A, A] table (intended, realised) per prefix."""

    def __init__(self, space: SequenceSpace, config: NetworkConfig, shape: ContextShape | None = None):
        super().__init__()
        self.space = space
        self.network = build_network(space, space.num_actions**2, config, shape)
        self.forbidden: Tensor
        self.register_buffer("forbidden", forbidden_actions(space), persistent=False)

    @property
    def thought_context(self) -> bool:
        """Whether it reads earlier intended tokens besides the realised ones."""
        return self.network.thought_context

    def forward(self, symbols: Tensor, rows: Tensor, context: Context | None = None) -> Tensor:
        """[N, A, A] for the prefixes at flat positions `rows` int64 [N] of `symbols` int64 [B, T]; rows sum to one."""
        return self._normalise(self.network(symbols, rows, context), rows % (self.space.max_length + 1))

    def start(self, context: Context | None = None) -> PrefixState:
        """The root, or that of each window, for one-step evaluation."""
        return self.network.start(context)

    def extend(self, state: PrefixState, parents: Tensor, symbols: Tensor) -> PrefixState:
        """The prefixes `parents[i]` followed by `symbols[i]`."""
        return self.network.extend(state, parents, symbols)

    def at(self, state: PrefixState) -> Tensor:
        """[N, A, A] for the prefixes of `state`."""
        depth = torch.tensor(state.depth, device=self.forbidden.device)
        return self._normalise(self.network.outputs(state), depth)

    def _normalise(self, outputs: Tensor, depth: Tensor) -> Tensor:
        actions = self.space.num_actions
        logits = outputs.float().view(-1, actions, actions)
        return logits.masked_fill(self.forbidden[depth][..., None, :], -torch.inf).log_softmax(-1)
