"""Configuration: what is read, and what is said about mistakes."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from distributed.cli import config_help
from distributed.comparison import ComparisonConfig, make_cells
from distributed.config import (
    DEFAULT_CONFIG,
    ConfigError,
    ExperimentConfig,
    apply_overrides,
    load_config,
    read_yaml,
    validate,
)
from distributed.config_keys import describe_fields, validate_section, without_credentials
from distributed.run import main
from distributed.search_space import check_space, draw_points
from distributed.sweep_config import SweepConfig


def test_the_default_config_is_the_tfbind8_task():
    config = load_config(DEFAULT_CONFIG)
    assert (config.oracle.factor, config.environment.noise, config.reward.exponent) == ("SIX6_REF_R1", 0.25, 3)
    assert (config.objective.name, config.run.backend) == ("subtb", "ray")


def test_every_config_in_the_repository_is_valid_and_says_what_it_is():
    files = sorted(DEFAULT_CONFIG.parent.glob("*.yaml"))
    assert files
    for file in files:
        values = read_yaml(file)
        if "comparison" in values:
            comparison = validate_section(ComparisonConfig, "comparison", values.pop("comparison"))
            assert make_cells(values, comparison)
        elif "sweep" in values:
            sweep = validate_section(SweepConfig, "sweep", values.pop("sweep"))
            check_space(values, sweep.space)
            assert draw_points(values, sweep.space, sweep.num_samples, np.random.default_rng(0))
        else:
            load_config(file)
        header = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert len(header) >= 2, f"{file.name}: no header"
        assert re.search(r"minute|second", " ".join(header)), f"{file.name}: its header names no run time"


def test_resolved_config_round_trips():
    config = load_config(DEFAULT_CONFIG, [("run.seed", "7")])
    assert validate(yaml.safe_load(config.to_yaml())) == config


def test_overrides_replace_values_and_create_sections():
    values = apply_overrides({"run": {"seed": 1}}, [("run.seed", "2"), ("environment.noise", "0.5")])
    assert values == {"run": {"seed": 2}, "environment": {"noise": 0.5}}


def test_another_oracle_discards_the_keys_of_the_old_one():
    overrides = [("oracle.function", "m:f"), ("oracle.name", "callable")]
    values = apply_overrides({"oracle": {"name": "tfbind8", "factor": "PAX3_REF_R1"}}, overrides)
    assert values == {"oracle": {"name": "callable", "function": "m:f"}}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("environment.noise", "1.5", r"environment\.noise: got 1\.5.*less than or equal to 1"),
        ("environment.nois", "0.5", r"environment\.nois: unknown key; allowed: alphabet, length"),
        ("environment.length", "eight", r"environment\.length: got 'eight'.*integer"),
        ("environment.alphabet", "AACG", r"environment\.alphabet: got 'AACG'"),
        ("environment.alphabet", "A>", r"environment\.alphabet.*not allowed"),
        ("oracle.name", "magic", r"oracle\.name: got 'magic'; allowed: 'tfbind8', 'csv'"),
        ("oracle.color", "red", r"oracle\.color: unknown key; allowed: name, factor"),
        ("objective.name", "reinforce", r"objective\.name: got 'reinforce'.*sgfn_db"),
        ("network.kmer_sizes", "[1]", r"network\.kmer_sizes"),
        ("run.name", "../up", r"run\.name: got '\.\./up'"),
        ("run.address", "ray://host:1", r"ray:// is not supported"),
        ("learner.learning_rate", ".nan", r"learner\.learning_rate: got nan"),
        ("learner.learning_rate", "0", r"learner\.learning_rate: got 0"),
        ("replay.offline_share", "0.25", r"offline_share > 0 needs an offline_source"),
        ("dynamics.mode", "on_policy", r"on_policy goes with replay\.priority_exponent: 0"),
        ("replay.offline_path", "x.csv", r"offline_path goes with offline_source"),
        ("run.name", "2024-13-45", r"--run\.name: not valid YAML"),
        ("tracking.mlflow_uri", "https://me:secret@host", r"no user or password.*"),
        ("run.seed", "-1", r"run\.seed: got -1"),
        ("nothing.at_all", "1", r"nothing: unknown key; allowed: run, generator, environment"),
        ("run", "1", r"unknown option"),
    ],
)
def test_a_mistake_is_named(key, value, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(DEFAULT_CONFIG, [(key, value)])


def test_credentials_are_not_repeated_in_messages():
    with pytest.raises(ConfigError) as caught:
        validate({"tracking": {"mlflow_uri": "https://me:secret@host/x"}})
    assert "secret" not in str(caught.value)
    assert "://***@host/x" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://u:p@ss@host/x", "http://***@host/x"),
        ("http://u:p/q@host", "http://***@host"),
        ("http://host/x?password=hush&n=1", "http://host/x?password=***&n=1"),
        ("sqlite:////data/me@home/mlflow.db", "sqlite:////data/me@home/mlflow.db"),
        ("http://host:5000/x", "http://host:5000/x"),
    ],
)
def test_secrets_in_addresses_are_masked_and_nothing_else(address, shown):
    assert without_credentials(f"no answer from '{address}'") == f"no answer from '{shown}'"


def test_naming_the_default_network_keeps_what_the_file_says_of_it():
    assert apply_overrides({"network": {"hidden_size": 64}}, [("network.name", "mlp")]) == {
        "network": {"hidden_size": 64, "name": "mlp"}
    }


def test_several_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        validate({"environment": {"noise": 2, "length": 0}})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: [1, 2", "not valid YAML"),
        ("- a\n- b", "mapping of sections"),
        ("run: 3", "mapping of sections"),
        ("run: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("x: " + "y" * 1_100_000, "larger than"),
    ],
)
def test_malformed_files(tmp_path: Path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_config(file)


def test_a_missing_file_and_one_that_is_not_text(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


def test_an_empty_file_is_the_default_task(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == ExperimentConfig()


def test_every_field_is_documented_and_shown_in_the_help():
    fields = list(describe_fields(ExperimentConfig))
    assert len(fields) > 60
    undocumented = [key for key, _, text in fields if len(text.split("[")[0].split()) < 2]
    assert not undocumented
    assert "--environment.noise  (default 0.25)" in config_help()


@pytest.mark.parametrize("arguments", [["--run.seed"], ["--bogus"], ["--run.seed", "--x"], ["a.yaml", "b.yaml"]])
def test_misuse_of_the_command_line_exits_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_print_config_shows_the_resolved_one(capsys):
    assert main(["--print-config", "--run.seed=5", "--run.name", "x"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["run"]["seed"], shown["environment"]["noise"]) == (5, 0.25)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--environment.length", "6"], "length 8"),
        (["--oracle.name", "csv", "--oracle.path", "none.csv"], "cannot be read"),
        (["--oracle.name", "callable", "--oracle.function", "no_such:f"], "no_such"),
        (["--evaluation.exact", "always", "--evaluation.max_sequences", "10"], "evaluation.exact"),
        (["--network.kmer_sizes", "[2, 8]"], "kmer_sizes"),
        (["--replay.offline_source", "file", "--replay.offline_path", "none.csv"], "cannot be read"),
        (["--run.backend", "serial", "--learner.device", "cuda"], "learner.device"),
    ],
)
def test_what_only_the_data_show_is_a_config_error_before_anything_starts(in_tmp_path, overrides, expected):
    if "cuda" in overrides:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=expected):
        main(["--run.name", "x", *overrides])
    assert not Path("runs").exists()
