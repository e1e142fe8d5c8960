"""The generator forecast through the commands: both backends, resume, sampled forecasts, files that do not fit."""

import csv
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import yaml

from distributed import attention, evaluate, run, sample
from distributed.api import load
from distributed.config import ConfigError, apply_overrides, load_config, validate
from distributed.run_folder import RunFolder
from distributed.training_loop import INTERRUPTED, Hooks
from tests.glossary import unexplained

ROOT = Path(__file__).parents[2]
CONFIG = {
    "run": {"backend": "serial", "num_learner_steps": 12, "name": "f"},
    "generator": {"name": "forecast", "num_paths": 16, "likelihood_weight": 0.1, "window_noise": 0.1},
    "data": {
        "path": "s.csv", "time_column": "t", "targets": ["y"], "window": 8, "horizon": 3, "season": 4, "num_bins": 6,
    },
    "environment": {"noise": 0.1},
    "reward": {"floor": 1e-30},
    "objective": {"name": "sgfn_db", "lookahead_weight": 0.1},
    "network": {"name": "transformer", "hidden_size": 8, "num_layers": 1, "num_heads": 2},
    "learner": {"batch_size": 32},
    "dynamics": {"batch_size": 16},
    "actors": {"batch_size": 32},
    "replay": {"replay_share": 0.25},
    "evaluation": {"every_steps": 6},
    "tracking": {"mlflow": False, "log_every_steps": 2},
}  # fmt: skip
BASELINES = ("naive", "seasonal_naive", "ets")


def config(**changes):
    return validate(apply_overrides(CONFIG, [(key, yaml.safe_dump(value)) for key, value in changes.items()]))


def write(folder: Path, rows: int = 120) -> None:
    rng, t = np.random.default_rng(0), np.arange(rows)
    y = np.sin(t * np.pi / 2) * 3 + rng.normal(size=rows)
    lines = ["t,y,x", *(f"{i},{a:.4f},{b:.4f}" for i, a, b in zip(t, y, rng.normal(size=rows), strict=True))]
    (folder / "s.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def data(in_tmp_path):
    write(in_tmp_path)
    return in_tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was stopped and resumed, and the same run without a stop."""
    folder = tmp_path_factory.mktemp("forecast")
    write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run.train(config(**{"run.name": "whole"}), None, None, None) == 0
        settings, asked = config(), Counter()

        def reason() -> str | None:
            asked["steps"] += 1
            return INTERRUPTED if asked["steps"] > 5 else None

        runs, summary = run.train_in_folder(settings, None, None, None, Hooks(stop_reason=reason))
        assert summary["status"] == INTERRUPTED
        assert 0 < summary["num_learner_steps"] < 12
        assert run.train(settings, runs, *run.newest_readable(runs, settings)) == 0
    return folder


def test_a_resumed_run_is_the_same_run(trained):
    ours, theirs = (json.loads((trained / f"runs/{name}/summary.json").read_text()) for name in ("f", "whole"))
    for name in ("crps", "mae", "coverage_90", "validation_crps", "num_sampled"):
        assert ours[name] == theirs[name], name


def test_what_a_run_leaves(trained):
    folder = RunFolder(trained / "runs/f")
    summary = json.loads(folder.summary_file.read_text())
    assert {"crps", "crps_naive", "crps_seasonal_naive", "crps_ets", "mae", "rmse", "mase", "coverage_90"} <= set(
        summary
    )
    assert summary["crps_seasonal_naive"] < summary["crps_naive"]
    assert summary["num_sampled"] == summary["num_stored"] + summary["num_dropped"]
    names = {name for record in folder.read_metrics() for name in record}
    assert {"future_ce", "lookahead_ce", "dynamics_ce", "validation_crps"} <= names
    interim = [record for record in RunFolder(trained / "runs/whole").read_metrics() if record["step"] < 12]
    assert not any("crps" in record for record in interim)  # the test rows are looked at once
    assert (folder.plots / "forecast.png").stat().st_size > 10_000
    assert not (folder.plots / "mode_logo.png").exists()
    assert unexplained(folder.path) == set()


def test_figures_do_not_change_when_judged_again(trained, capsys):
    assert evaluate.main([str(trained / "runs/f"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    summary = json.loads((trained / "runs/f/summary.json").read_text())
    assert figures["crps"] == summary["crps"]
    assert evaluate.main([str(trained / "runs/f")]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in BASELINES)
    assert "LOSES to seasonal naive" in shown or "below seasonal naive" in shown


def test_forecasts_as_csv_and_fan_chart(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    out = tmp_path / "next.csv"
    assert sample.main(["runs/f", "-n", "40", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [float(row["time"]) for row in rows] == [120, 121, 122]
    for row in rows:
        paths = np.array([float(row[f"path_{n}"]) for n in range(1, 41)])
        assert float(row["q50"]) == pytest.approx(np.median(paths), rel=1e-5)
        assert float(row["q05"]) <= float(row["q25"]) <= float(row["q75"]) <= float(row["q95"])
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert sample.main(["runs/f", "-n", "3", "--origin", "60", "--out", str(tmp_path / "past.csv")]) == 0
    assert [row["target"] for row in csv.DictReader((tmp_path / "past.csv").open())] == ["y"] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--origin", "1e9"], "no row has the time"),
        (["--origin", "2"], "fewer than data.window"),
        (["--top-k", "2"], "top_k: not for generator.name forecast"),
        (["--select", "top"], "select: not for"),
        (["--format", "fasta"], "written as csv"),
        (["--out", "missing/x.csv"], "cannot be written"),
    ],
)
def test_sampling_that_cannot_be(trained, monkeypatch, arguments, message):
    monkeypatch.chdir(trained)
    with pytest.raises(ConfigError, match=message):
        sample.main(["runs/f", "-n", "2", *arguments])


def test_attention_is_for_sequences(trained):
    with pytest.raises(ConfigError, match="draws no sequences"):
        attention.main([str(trained / "runs/f"), "AB"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator.name": "gflownet"}, "goes with generator.name: forecast"),
        ({"environment.length": 5}, "takes only the noise"),
        ({"network.name": "mlp"}, "reads no windows"),
        ({"replay.offline_source": "lower_half"}, "has none"),
        ({"evaluation.exact": "always"}, "test rows"),
        ({"data.colour": 1}, "data.colour: unknown key"),
        ({"data.window": 0}, "data.window"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_forecast_needs_data():
    with pytest.raises(ConfigError, match=r"goes with generator\.name: forecast, which needs it"):
        validate(CONFIG | {"data": None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t,y\n" + "".join(f"{i},1\n" for i in range(60)), "'y' is constant"),
        ("t,y\n" + "".join(f"{i},{i % 7}\n" for i in range(12)), "12 rows are too few"),
        ("t,y\n" + "".join(f"{i},{i % 7}\n" for i in range(50)) + "50,much\n", "'y' has no number.*row 51"),
        ("t,y\n1,2\n1,3\n", "row 2 is there twice"),
        ("t,z\n1,2\n", "no column 'y'; allowed: z"),
    ],
)
def test_data_that_cannot_be(data, text, message):
    """Before a run folder is made."""
    (data / "s.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        run.train(config(), None, None, None)
    assert not (data / "runs").exists()


@pytest.mark.parametrize("name", ["co2", "csv", "macro", "sunspots"])
def test_the_shipped_configs_are_complete(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = load_config(ROOT / "tune_configs" / f"forecast_{name}.yaml")
    evaluator = run.prepare(settings, run.make_environment(settings), resumed=False)
    assert len(evaluator.task.origins("test")) > 20


def test_on_ray(ray_session, data):
    settings = config(
        **{"run.backend": "ray", "run.name": "r", "actors.num_rollout_actors": 2, "data.targets": ["y", "x"]}
    )
    assert run.train(settings, None, None, None) == 0
    summary = json.loads((data / "runs/r/summary.json").read_text())
    assert summary["num_learner_steps"] >= 12
    assert np.isfinite(summary["crps"])
    assert summary["num_sampled"] == summary["num_stored"] + summary["num_dropped"]


def test_a_forecast_from_python_is_that_of_the_command(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    forecast = load("runs/f").forecast(5, seed=2)
    assert forecast.paths.shape == (5, 3, 1)
    assert forecast.past.shape == (8, 1)
    assert np.isnan(forecast.actual).all()  # the future of the last row
    assert sample.main(["runs/f", "-n", "5", "--seed", "2", "--out", str(tmp_path / "x.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [float(row["path_4"]) for row in rows] == pytest.approx(forecast.paths[3, :, 0], rel=1e-6)
    past = load("runs/f").forecast(5, origin="60")
    assert list(past.times) == [61, 62, 63]
    assert np.isfinite(past.actual).all()
    with pytest.raises(ConfigError, match="draws no sequences, but paths"):
        load("runs/f").sample(3)


def test_an_exported_forecaster_can_be_moved_and_served(trained, tmp_path, monkeypatch):
    from distributed.mlflow_model import SequenceSampler

    monkeypatch.chdir(trained)
    run_ = load("runs/f")
    exported = run_.export(tmp_path / "x")
    monkeypatch.chdir(tmp_path)
    moved = exported.rename(tmp_path / "moved")
    assert (moved / "data" / "data_path.csv").read_bytes() == (trained / "s.csv").read_bytes()
    assert load(moved).evaluate()["crps"] == run_.summary["crps"]
    model = SequenceSampler()
    model.load_context(SimpleNamespace(artifacts={"sampler": str(moved)}))
    table = model.predict(None, pandas.DataFrame({"n": [2, 1], "origin": ["60", None]}))
    assert list(table.columns) == ["time", "target", "path", "value"]
    assert table.groupby(table["time"].astype(float)).size().to_dict() == {61: 2, 62: 2, 63: 2, 120: 1, 121: 1, 122: 1}
    assert table["value"].to_numpy()[:6].reshape(2, 3) == pytest.approx(run_.forecast(2, origin="60").paths[..., 0])


def test_the_report_compares_with_the_baselines(trained):
    folder = RunFolder(trained / "runs/f")
    page = folder.report_file.read_text()
    assert "Is it better than a simple forecast?" in page
    assert "<td>seasonal_naive</td>" in page
    assert page.count("data:image/png;base64,") == 2  # the fan chart and the learning curves
    assert not folder.modes_file.exists()


def test_a_forecaster_starts_from_another_and_ends_by_a_metric(trained, monkeypatch):
    monkeypatch.chdir(trained)
    start = {"run.start_from": "runs/f", "run.name": "warm", "data.train_share": 0.75}
    stop = {"run.stop_when.metric": "validation_crps", "run.stop_when.below": 1e9, "run.num_learner_steps": 24}
    assert run.train(config(**start, **stop), None, None, None) == 0
    warm = load("runs/warm")
    assert "validation_crps" in warm.summary["stop_reason"]
    assert warm.summary["num_learner_steps"] < 12
    with pytest.raises(ConfigError, match=r"data\.num_bins is 5 here and 6 there"):
        run.train(config(**start | {"data.num_bins": 5}), None, None, None)


def test_sequences_and_forecasts_do_not_start_from_each_other(trained, toy):
    with pytest.raises(ConfigError, match=r"generator\.name is gflownet here and forecast there"):
        run.train(toy(**{"run.start_from": str(trained / "runs/f")}), None, None, None)
