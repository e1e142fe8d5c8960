"""Networks over prefixes, exchangeable by one config field.

Each offers `forward` (all prefixes of a batch) and `start/extend/outputs` (rollouts, token by token). What they read is
a string of *symbols*: the realised tokens or, with a thought context, pairs of realised and intended tokens.
"""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from learner.networks.context import ContextShape
from learner.networks.mlp import MLPConfig, PrefixMLP
from learner.networks.prefixes import PrefixNetwork
from learner.networks.transformer import PrefixTransformer, TransformerConfig
from learner.space import SequenceSpace


def _name(config: Any) -> str:
    return config.get("name", "mlp") if isinstance(config, dict) else getattr(config, "name", "mlp")


NetworkConfig = Annotated[
    Annotated[MLPConfig, Tag("mlp")] | Annotated[TransformerConfig, Tag("transformer")], Discriminator(_name)
]


def build_network(
    space: SequenceSpace, num_outputs: int, config: NetworkConfig, shape: ContextShape | None = None
) -> PrefixNetwork:
    """The network that `config.name` asks for; with a `shape`, a transformer reads windows of that shape, an MLP none."""
    if isinstance(config, TransformerConfig):
        return PrefixTransformer(space, num_outputs, config, shape)
    return PrefixMLP(space, num_outputs, config)
