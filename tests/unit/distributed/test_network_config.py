"""Networks in the configuration: chosen by name, changed by overrides, and what is said about mistakes."""

import copy

import pytest

from distributed.config import ConfigError, ExperimentConfig, apply_overrides, validate
from learner.networks import MLPConfig, TransformerConfig


def test_networks_are_named_in_the_config():
    config = validate({"network": {"name": "transformer", "thought_context": True, "num_heads": 8}})
    assert config.network == TransformerConfig(name="transformer", thought_context=True, num_heads=8)
    config = validate({"dynamics": {"network": {"name": "transformer", "hidden_size": 16}}})
    assert config.dynamics.network == TransformerConfig(name="transformer", hidden_size=16)
    assert config.network == MLPConfig()


def test_without_a_name_it_is_the_mlp():
    assert validate({"network": {"hidden_size": 64}}).network == MLPConfig(hidden_size=64)
    assert validate({"dynamics": {"network": {"hidden_size": 64}}}).dynamics.network.name == "mlp"
    assert validate({}).network == ExperimentConfig().network == MLPConfig()


@pytest.mark.parametrize("section", ["network", "dynamics.network"])
def test_overrides_choose_the_network(section: str):
    mlp = {"name": "mlp", "hidden_size": 32, "kmer_sizes": [2]}
    values = {"network": mlp} if section == "network" else {"dynamics": {"network": mlp, "batch_size": 7}}
    overrides = [(f"{section}.num_heads", "2"), (f"{section}.name", "transformer"), (f"{section}.hidden_size", "8")]
    config = validate(apply_overrides(values, overrides))
    chosen = config.network if section == "network" else config.dynamics.network
    assert chosen == TransformerConfig(name="transformer", num_heads=2, hidden_size=8)
    if section != "network":
        assert config.dynamics.batch_size == 7


@pytest.mark.parametrize("key", ["network.hidden_size", "dynamics.network.hidden_size", "dynamics.network.name"])
def test_overrides_leave_the_given_values_alone(key: str):
    values = {"network": {"hidden_size": 32}, "dynamics": {"network": {"hidden_size": 32}}}
    kept = copy.deepcopy(values)
    apply_overrides(values, [(key, "8")])
    assert values == kept


def test_naming_the_transformer_again_keeps_what_the_file_says_of_it():
    values = {"network": {"name": "transformer", "hidden_size": 8}}
    changed = apply_overrides(values, [("network.name", "transformer"), ("network.num_layers", "1")])
    assert changed == {"network": {"name": "transformer", "hidden_size": 8, "num_layers": 1}}


@pytest.mark.parametrize("section", ["network", "dynamics.network"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"name": "transformer", "hidden_size": 6}, "{}: hidden_size 6 must be a multiple of num_heads 4"),
        ({"name": "transformer", "num_heads": 0}, "{}.num_heads: got 0; input should be greater than or equal to 1"),
        ({"name": "transformer", "num_layers": "x"}, "{}.num_layers: got 'x'; input should be a valid integer"),
        ({"name": "transformer", "thought_context": 3}, "{}.thought_context: got 3"),
        ({"name": "transformer", "kmer_sizes": []}, "{}.kmer_sizes: unknown key; allowed: name, hidden_size, num_layers,"),
        ({"hidden_size": 0}, "{}.hidden_size: got 0"),
        ({"num_heads": 2}, "{}.num_heads: unknown key; allowed: name, hidden_size, num_layers, "),
        ({"name": "rnn"}, "{}.name: got 'rnn'; allowed: 'mlp', 'transformer'"),
        (5, "{}: got 5"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key_without_the_kind_of_network(section: str, values: object, expected: str):
    with pytest.raises(ConfigError) as caught:
        validate({"network": values} if section == "network" else {"dynamics": {"network": values}})
    (line,) = str(caught.value).splitlines()
    assert line.startswith(expected.format(section))


def test_a_resolved_transformer_round_trips():
    import yaml

    config = validate({"network": {"name": "transformer", "hidden_size": 16, "thought_context": True}})
    assert validate(yaml.safe_load(config.to_yaml())) == config
