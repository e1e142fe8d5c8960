"""Networks over prefixes. Each offers `forward` (all prefixes of a batch) and `start/extend/outputs` (rollouts)."""

from learner.networks.mlp import MLPConfig, PrefixMLP
from learner.space import SequenceSpace

NetworkConfig = MLPConfig


def build_network(space: SequenceSpace, num_outputs: int, config: NetworkConfig) -> PrefixMLP:
    """The network that `config.name` asks for."""
    return PrefixMLP(space, num_outputs, config)
