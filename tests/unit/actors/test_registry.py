"""Oracles by name."""

import json

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.oracles.callable import CallableOracle
from actors.oracles.registry import OracleConfig, build_oracle
from actors.oracles.table import LookupOracle, TableOracle

DNA = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=8))
CONFIG = TypeAdapter(OracleConfig)


@pytest.fixture
def settings(tmp_path, monkeypatch) -> dict[str, dict]:
    """Settings of an oracle of each name."""
    (tmp_path / "data.csv").write_text("sequence,score\nACGTACGT,0.5\n")
    np.save(tmp_path / "x.npy", np.zeros((1, 8), int))
    np.save(tmp_path / "y.npy", np.ones(1))
    (tmp_path / "registry_scorer.py").write_text("def score(sequences):\n    return [0.0 for _ in sequences]\n")
    monkeypatch.syspath_prepend(tmp_path)
    return {
        "tfbind8": {"name": "tfbind8"},
        "csv": {"name": "csv", "path": str(tmp_path / "data.csv")},
        "npy": {"name": "npy", "tokens_path": str(tmp_path / "x.npy"), "scores_path": str(tmp_path / "y.npy")},
        "callable": {"name": "callable", "function": "registry_scorer:score"},
    }


@pytest.mark.parametrize(
    ("name", "kind", "score"),
    [
        ("tfbind8", TableOracle, None),
        ("csv", LookupOracle, 0.5),
        ("npy", LookupOracle, 0),
        ("callable", CallableOracle, 0),
    ],
)
def test_every_name_builds_its_oracle(settings, name, kind, score):
    config = CONFIG.validate_python(settings[name])
    assert CONFIG.validate_json(json.dumps(CONFIG.dump_python(config, mode="json"))) == config
    oracle = build_oracle(config, DNA)
    try:
        assert type(oracle) is kind
        assert oracle.enumerable == (name != "callable")
        (found,) = oracle.score(*DNA.tokens(["ACGTACGT"], origin="test"))
        assert found == score if score is not None else 0 < found < 1
    finally:
        oracle.close()


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(ValidationError) as caught:
        CONFIG.validate_python({"name": "magic"})
    assert "'magic'" in str(caught.value)
    for name in ("tfbind8", "motifs", "csv", "npy", "callable"):
        assert f"'{name}'" in str(caught.value)


@pytest.mark.parametrize("name", ["tfbind8", "csv", "npy", "callable"])
def test_an_unknown_key_is_named(settings, name):
    with pytest.raises(ValidationError, match=r"colour\n.*Extra inputs are not permitted"):
        CONFIG.validate_python(settings[name] | {"colour": "red"})


@pytest.mark.parametrize(
    ("name", "missing"),
    [("csv", "path"), ("npy", "tokens_path"), ("npy", "scores_path"), ("callable", "function")],
)
def test_a_missing_key_is_named(settings, name, missing):
    del settings[name][missing]
    with pytest.raises(ValidationError, match=rf"{missing}\n.*Field required"):
        CONFIG.validate_python(settings[name])
