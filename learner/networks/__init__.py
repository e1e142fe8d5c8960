"""Networks over prefixes. Each offers `forward` (all prefixes of a batch) and `start/extend/outputs` (rollouts)."""

from typing import Protocol

from torch import Tensor

from learner.networks.mlp import MLPConfig, PrefixMLP, PrefixState
from learner.space import SequenceSpace

NetworkConfig = MLPConfig


class PrefixNetwork(Protocol):
    """What objectives, rollouts and exact evaluation ask of a network."""

    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor: ...
    def start(self) -> PrefixState: ...
    def extend(self, state: PrefixState, parents: Tensor, tokens: Tensor) -> PrefixState: ...
    def outputs(self, state: PrefixState) -> Tensor: ...


def build_network(space: SequenceSpace, num_outputs: int, config: NetworkConfig) -> PrefixMLP:
    """The network that `config.name` asks for."""
    return PrefixMLP(space, num_outputs, config)
