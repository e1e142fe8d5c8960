"""Attention maps of a trained transformer, from the command line."""

import numpy as np
import pytest

from distributed import attention
from distributed.config import ConfigError
from distributed.evaluate import open_sampler
from distributed.run import train

TRANSFORMER = {"network": {"name": "transformer", "hidden_size": 8, "num_layers": 2, "num_heads": 2}}


@pytest.fixture
def trained(in_tmp_path, toy):
    def make(**changes):
        config = toy(**{"evaluation.exact": "auto"} | changes)
        assert train(config, None, None, None) == 0
        return config.run.output_folder / config.run.name

    return make


@pytest.mark.parametrize("thoughts", [False, True])
def test_maps_are_drawn_and_causal(trained, thoughts, in_tmp_path, capsys):
    network = TRANSFORMER["network"] | {"thought_context": thoughts, "num_thought_layers": 1}
    run = trained(**{f"network.{key}": value for key, value in network.items()})
    assert attention.main([str(run), "ABA", "--intended", "AAA", "--out", "maps.png"]) == 0
    assert (in_tmp_path / "maps.png").stat().st_size > 5_000
    assert capsys.readouterr().out.endswith("maps.png\n")
    evaluator, weights = open_sampler(run, [])
    evaluator.load(weights)
    maps = attention.attention(evaluator, "ABA", "AAA")
    assert [m.shape for m in maps] == [(2, 2, 4, 4), (1, 2, 4, 4)][: 1 + thoughts]
    for stream in maps:
        np.testing.assert_allclose(stream.sum(-1), 1, atol=1e-6)
        assert np.abs(np.triu(stream, 1)).max() == 0
    evaluator.oracle.close()


def test_what_cannot_be_drawn_is_named(trained, in_tmp_path):
    run = trained(**{f"network.{key}": value for key, value in TRANSFORMER["network"].items()})
    for arguments, message in (
        (["ABX"], "has 'X' at position 3"),
        (["AB"], "has length 2"),
        (["ABA", "--intended", "AB"], "has 2 tokens, the sequence 3"),
        (["ABA", "--out", "missing/maps.png"], "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=message):
            attention.main([str(run), *arguments])


def test_a_network_without_attention_is_named(trained):
    with pytest.raises(ConfigError, match=r"network\.name: mlp has no attention; allowed: transformer"):
        attention.main([str(trained()), "ABA"])
