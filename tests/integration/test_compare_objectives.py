"""The command that compares objectives: real cells of a toy on the real table, continued after an interruption."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed import compare_objectives
from distributed.comparison import ComparisonConfig, make_cells, summarise
from distributed.config import ConfigError

ROOT = Path(__file__).parents[2]
SMALL = """
comparison:
  cpu_seconds: 1
  noise: [0, 0.25]
  seeds: [0]
  num_processes: 2
  baselines: [uniform, metropolis_hastings, genetic]
  variants:
    balance: {objective: {name: sgfn_marginal}}
    seeking: {objective: {name: ppo}}
network: {hidden_size: 16, num_layers: 2, kmer_sizes: []}
actors: {batch_size: 256}
evaluation: {num_samples: 256}
"""


def write(path: Path, text: str = SMALL) -> Path:
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    config = write(folder / "c.yaml")
    assert compare_objectives.main([str(config), "--out", str(folder / "out")]) == 0
    return config, folder / "out"


def test_every_cell_is_computed_and_tabulated(finished):
    _, out = finished
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    keys = {(r["variant"], r["noise"]) for r in results}
    assert len(results) == len(keys) == 10
    figures = {(r["variant"], r["noise"]): r for r in results}
    for noise, uniform, designs in ((0.0, 0.4034, 0.0), (0.25, 0.4034, 0.2147)):
        assert figures["uniform", noise]["exact_tv"] == pytest.approx(uniform, abs=5e-4)
        assert figures["metropolis_hastings", noise]["exact_tv"] == pytest.approx(designs, abs=5e-4)
        assert "exact_tv" not in figures["genetic", noise]  # it has no law that could be known
        assert figures["genetic", noise]["mean_score"] > figures["uniform", noise]["mean_score"] + 0.05
    assert all(1 <= r["cpu_seconds"] < 3 for r in results)
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert len(rows) == 10
    assert (out / "table.png").stat().st_size > 10_000


def test_a_finished_comparison_is_not_computed_again(finished, capsys):
    config, out = finished
    before = (out / "results.jsonl").read_text()
    start = time.monotonic()
    assert compare_objectives.main([str(config), "--out", str(out)]) == 0
    assert time.monotonic() - start < 20
    assert (out / "results.jsonl").read_text() == before
    assert "metropolis_hastings" in capsys.readouterr().out


def test_a_folder_of_another_comparison_is_refused(finished):
    config, out = finished
    with pytest.raises(ConfigError, match="holds the results of another comparison"):
        compare_objectives.main([str(config), "--out", str(out), "--comparison.cpu_seconds", "2"])


def test_an_interruption_keeps_what_is_finished(tmp_path):
    config = write(tmp_path / "c.yaml")
    command = [sys.executable, "-m", "distributed.compare_objectives", str(config), "--out", str(tmp_path / "out")]
    command += ["--comparison.num_processes", "1", "--comparison.noise", "[0]"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    results = tmp_path / "out" / "results.jsonl"
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not results.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert 1 <= len(results.read_text().splitlines()) < 5
    results.write_text(results.read_text() + '{"variant": "bal')  # a line cut short is computed again
    done = subprocess.run([*command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len([1 for line in results.read_text().splitlines() if line.endswith("}")]) >= 5


def test_a_cell_that_fails_costs_no_other(tmp_path, capfd):
    broken = "broken: {oracle: {name: callable, function: 'tests.oracles:always_raises'}}"
    text = SMALL.replace("noise: [0, 0.25]", "noise: [0]").replace("seeking: {objective: {name: ppo}}", broken)
    assert compare_objectives.main([str(write(tmp_path / "c.yaml", text)), "--out", str(tmp_path / "out")]) == 1
    finished = [json.loads(line)["variant"] for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert sorted(finished) == ["balance", "genetic", "metropolis_hastings", "uniform"]
    assert "broken, noise 0, seed 0 failed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": {"objective": {"name": "reinforce"}}}}, r"comparison\.variants\.a: objective\.name"),
        ({"variants": {"a": {"objectives": {}}}}, r"comparison\.variants\.a: objectives: unknown key"),
        ({"variants": {"uniform": {}}, "baselines": ["uniform"]}, "is the name of a baseline"),
        ({"variants": {"a": {}}, "noise": [2.0]}, r"environment\.noise"),
    ],
)
def test_a_mistake_is_found_before_anything_is_computed(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_cells({}, ComparisonConfig(**changes))


def test_unknown_keys_of_the_section_are_named(tmp_path):
    config = write(tmp_path / "c.yaml", SMALL + "\n")
    with pytest.raises(ConfigError, match=r"comparison\.speed: unknown key; allowed: variants"):
        compare_objectives.main([str(config), "--comparison.speed", "1"])


def test_the_summary_takes_median_and_extremes():
    results = [{"variant": "a", "noise": 0.1, "seed": s, "exact_tv": v} for s, v in enumerate((0.3, 0.1, 0.2))]
    (row,) = summarise(results)
    assert (row.num_seeds, row.figures["exact_tv"]) == (3, (0.2, 0.1, 0.3))
