"""The command that compares runs, on a real MLflow store: real runs of the toy, and parents and children made by hand."""

import csv
import json
import math
import shutil
import sqlite3
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from distributed import cli, compare
from distributed.config import ConfigError, apply_overrides, validate
from distributed.run import train
from distributed.run_folder import RunFolder
from tests.conftest import TOY


def address(folder: Path) -> str:
    """Of a store in a folder; absolute, since MLflow keeps the stores that a process has opened by their address."""
    return f"sqlite:///{folder}/mlflow.db"


class Logged(NamedTuple):
    """What the store holds: ids of runs by name, of the same name in order of their making."""

    folder: Path
    ids: dict[str, list[str]]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", address(folder))
        for name, changes in (("clean", {"environment.noise": "0"}), ("noisy", {}), ("unlogged", {})):
            changes |= {"tracking.mlflow": str(name != "unlogged"), "tracking.experiment": "toys", "run.name": name}
            assert train(validate(apply_overrides(TOY, list(changes.items()))), None, None, None) == 0
        client = MlflowClient(address(folder))
        make_sweep(client)
        ids: dict[str, list[str]] = {}
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for run in client.search_runs(experiments, order_by=["attributes.start_time ASC"]):
            ids.setdefault(run.info.run_name, []).append(run.info.run_id)
    return Logged(folder, ids)


def make_sweep(client: MlflowClient) -> None:
    """Experiment `sweeps`: a parent of four, of which one has logged nothing, and two runs of one name."""
    experiment = client.create_experiment("sweeps")
    parent = client.create_run(experiment, run_name="sweep", start_time=1000).info.run_id
    client.log_metric(parent, "best_excess_kl", 0.1)
    for number, final in enumerate((0.3, 0.1, math.inf, None)):
        tags = {"mlflow.parentRunId": parent}
        run = client.create_run(experiment, start_time=2000 + number, tags=tags, run_name=f"trial {number} [b]$^$")
        client.log_param(run.info.run_id, "learner.learning_rate", number)
        if final is not None:
            client.log_batch(run.info.run_id, [*history(0, (5, 1), (9, 0.5)), Metric("final_excess_kl", final, 1, 9)])
            client.log_batch(run.info.run_id, [Metric("final_mean_score", number, 1, 9)])
    for number in range(2):
        run = client.create_run(experiment, run_name="twin's", start_time=3000 + number)
        client.log_batch(run.info.run_id, history(number, (1, number)))


def history(timestamp: int, *points: tuple[int, float], name: str = "excess_kl") -> list[Metric]:
    return [Metric(name, value, timestamp, step) for step, value in points]


@pytest.fixture(autouse=True)
def in_folder(logged, monkeypatch):
    monkeypatch.chdir(logged.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address(logged.folder))


def table(out: Path, *arguments: str) -> list[dict[str, str]]:
    assert compare.main([*arguments, "--out", str(out)]) == cli.EXIT_DONE
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    return list(csv.DictReader((out / "compare.csv").open()))


def names(rows: list[dict[str, str]]) -> list[str]:
    return [row["name"] for row in rows]


def test_folders_ids_and_names_mean_the_same_runs_each_once(logged, tmp_path):
    clean, noisy = logged.ids["clean"][0], logged.ids["noisy"][0]
    for words in (["runs/clean", "runs/noisy"], [clean, noisy], ["clean", "noisy"], ["clean", "runs/clean", noisy]):
        assert sorted(row["run_id"] for row in table(tmp_path, *words)) == sorted([clean, noisy])


def test_the_table_holds_what_the_runs_reached_best_first(tmp_path, capsys):
    rows = table(tmp_path, "runs/noisy", "runs/clean")
    summaries = {
        row["name"]: json.loads(RunFolder(Path("runs") / row["name"]).summary_file.read_text()) for row in rows
    }
    for row in rows:
        assert row["status"] == "FINISHED"
        for key in ("excess_kl", "exact_tv", "mean_score", "num_trajectories", "wall_seconds", "mean_hamming"):
            assert float(row[key]) == pytest.approx(summaries[row["name"]][key])
    assert names(rows) == sorted(summaries, key=lambda name: summaries[name]["excess_kl"])
    assert {key for key in rows[0] if "." in key} == {"environment.noise", "run.name"}
    assert {row["name"]: float(row["environment.noise"]) for row in rows} == {"clean": 0, "noisy": 0.2}
    captured = capsys.readouterr()
    assert "environment.noise" in captured.out
    assert "run.name" not in captured.out
    assert f"{summaries['clean']['excess_kl']:.4g}" in captured.out
    assert [word for word in captured.out.split() if word in ("clean", "noisy")] == names(rows)
    assert "excess_kl" not in captured.err


def test_curves_are_what_the_runs_recorded(logged):
    store = compare.Store(address(logged.folder))
    runs = compare.runs_of_experiment(store, "toys", "")
    curves = compare.read_curves(store, runs, ["excess_kl", "num_trajectories"])
    assert len(runs) == 2
    for run in runs:
        records = list(RunFolder(Path("runs") / run.info.run_name).read_metrics())
        recorded = {record["step"]: record["excess_kl"] for record in records if "excess_kl" in record}
        steps, values = curves[run.info.run_id, "excess_kl"]
        assert list(steps) == sorted(recorded)
        assert np.allclose(values, list(recorded.values()))
        assert [list(part) for part in curves[run.info.run_id, "num_trajectories"]] == [[24], [768]]


def test_a_step_that_was_taken_twice_counts_as_the_second_time(tmp_path):
    client = MlflowClient(address(tmp_path))
    run_id = client.create_run("0").info.run_id
    client.log_batch(run_id, history(20, (3, 0.3), (4, math.inf), (2, 0.2)))
    client.log_batch(run_id, history(10, (1, 9), (2, 9), (3, 9)))
    steps, values = compare.Store(address(tmp_path)).curve(run_id, "excess_kl")
    assert (steps.tolist(), values.tolist()) == ([1, 2, 3], [9, 0.2, 0.3])


def test_a_parent_stands_for_its_children(logged, tmp_path, capsys):
    for word in ("sweep", logged.ids["sweep"][0]):
        rows = table(tmp_path, word)
        assert names(rows) == [f"trial {number} [b]$^$" for number in (1, 0, 2, 3)]
        figures = {row["name"]: row["excess_kl"] for row in rows}
        assert figures == {f"trial {n} [b]$^$": text for n, text in enumerate(("0.3", "0.1", "inf", ""))}
        assert [row["learner.learning_rate"] for row in rows] == ["1", "0", "2", "3"]
    assert "trial 1 [b]$^$" in capsys.readouterr().out


def test_an_experiment_is_all_its_runs_but_parents(logged, tmp_path):
    assert sorted(names(table(tmp_path, "--experiment", "toys"))) == ["clean", "noisy"]
    rows = table(tmp_path, "--experiment", "sweeps")
    assert len(rows) == 6
    assert "sweep" not in names(rows)
    rows = table(tmp_path, "--experiment", "sweeps", "--filter", "metrics.final_excess_kl < 0.2")
    assert names(rows) == ["trial 1 [b]$^$"]
    with pytest.raises(ConfigError, match="no runs that pass --filter"):  # only the parent does
        table(tmp_path, "--experiment", "sweeps", "--filter", "metrics.best_excess_kl > 0")


def test_of_runs_of_one_name_the_newest_is_taken(logged, tmp_path, capsys):
    newest = logged.ids["twin's"][1]
    assert [row["run_id"] for row in table(tmp_path, "twin's")] == [newest]
    assert f"2 runs are named twin's; taking the newest, {newest}" in capsys.readouterr().err


def test_no_more_runs_than_the_limit(logged, tmp_path, capsys):
    rows = table(tmp_path, "--experiment", "sweeps", "--limit", "2")
    assert {row["run_id"] for row in rows} == set(logged.ids["twin's"])
    assert "6 runs; only the newest 2" in capsys.readouterr().err


def test_more_of_some_metrics_is_better_and_final_figures_go_before_the_last(logged, tmp_path, capsys):
    rows = table(tmp_path, "sweep", "--metric", "mean_score", "--metric", "final_excess_kl")
    assert [row["mean_score"] for row in rows] == ["2.0", "1.0", "0.0", ""]
    assert list(rows[0])[4:6] == ["mean_score", "excess_kl"]
    assert "most mean_score first" in capsys.readouterr().out
    assert [row["excess_kl"] for row in table(tmp_path, "twin's")] == ["1.0"]  # it has no final figure


@pytest.mark.parametrize(
    ("metric", "values", "order"),
    [
        ("excess_kl", [3, None, -1, math.inf], [2, 0, 3, 1]),
        ("num_modes", [3, None, -1, 7], [3, 0, 2, 1]),
        ("log_z_error", [3, None, -1, -4], [2, 0, 3, 1]),
    ],
)
def test_the_order_of_runs(metric, values, order):
    assert sorted(range(4), key=lambda index: compare.badness(metric, values[index])) == order


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are drawn, which can be looked at."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    return drawn


def test_a_few_runs_have_a_panel_for_each_metric_and_a_legend(tmp_path, figures):
    table(tmp_path, "runs/clean", "runs/noisy")
    (figure,) = figures
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["excess KL to the target [nats]", "exact total variation", "mean_score", "top100_mean"]
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == ["clean", "noisy"]
    assert [len(axes.lines) for axes in figure.axes] == [2] * 4
    assert list(figure.axes[0].lines[0].get_xdata()) == [8, 16, 24]
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[1].get_yscale() == "linear"


def test_many_runs_are_coloured_by_their_final_value(tmp_path, figures):
    client = MlflowClient(address(tmp_path))
    for number in range(13):
        run_id = client.create_run("0", run_name="same").info.run_id
        client.log_batch(run_id, history(0, (1, 1.0), (2, number % 12 + 1)))
    table(tmp_path, "--experiment", "Default", "--tracking-uri", address(tmp_path))
    (figure,) = figures
    assert not figure.legends
    assert len(figure.axes) == 2  # the panel and its colour bar
    lines = figure.axes[0].lines
    by_end = {line.get_ydata()[-1]: line.get_color() for line in lines}
    assert (len(lines), len(set(by_end.values()))) == (13, 12)
    assert lines[-1].get_ydata()[-1] == 1  # the best is drawn last


def test_runs_of_one_name_are_told_apart(logged, tmp_path, capsys):
    first, second = logged.ids["twin's"]
    table(tmp_path, first, second)
    out = capsys.readouterr().out
    assert f"twin's ({first[:8]})" in out
    assert f"twin's ({second[:8]})" in out


def test_the_store_that_a_folder_logs_to_is_read(logged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for name, uri in (("clean", address(logged.folder)), ("noisy", "sqlite:///other.db")):
        shutil.copytree(logged.folder / "runs" / name, name)
        config = yaml.safe_load((Path(name) / "config.yaml").read_text())
        config["tracking"]["mlflow_uri"] = uri
        (Path(name) / "config.yaml").write_text(yaml.safe_dump(config))
    assert [row["run_id"] for row in table(tmp_path, "clean")] == logged.ids["clean"]
    with pytest.raises(ConfigError, match=r"several stores .*other\.db.*--tracking-uri"):
        compare.main(["clean", "noisy"])
    assert len(table(tmp_path, "clean", "noisy", "--tracking-uri", address(logged.folder))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either runs, or --experiment"),
        (["clean", "--experiment", "toys"], "either runs, or --experiment"),
        (["clean", "--filter", "metrics.loss < 1"], "--filter goes with --experiment"),
        (["clean", "--limit", "0"], "--limit: got 0"),
        (["nobody"], "nobody: neither a run folder, nor the id or name"),
        (["clean", "0" * 32], "0: neither a run folder"),
        (["runs"], "runs: neither a run folder"),
        (["runs/unlogged"], r"runs/unlogged: this run was not logged to MLflow at sqlite:.*mlflow\.db"),
        (["--experiment", "nowhere"], r"no 'nowhere'; it has Default, sweeps, toys"),
        (["--experiment", "Default"], "'Default' has no runs$"),
        (["clean", "--metric", "fame"], r"no run has 'fame'; there are .*, excess_kl, .*, wall_seconds"),
        (["trial 3 [b]$^$"], "no metrics yet"),
        (["--experiment", "toys", "--filter", "loss is small"], "^--filter: Invalid clause"),
        (["--experiment", "toys", "--filter", "metrics.loss < small"], "^--filter: Expected numeric"),
        (["clean", "--out", "mlflow.db"], "--out: mlflow.db cannot be written"),
        (["clean", "--tracking-uri", "foo://x"], "MLflow at foo://x: .*unsupported URI"),
    ],
)
def test_what_is_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        compare.main(["--out", str(tmp_path), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_newest_checkpoint_is_damaged(logged, tmp_path, capsys):
    shutil.copytree("runs/clean", tmp_path / "clean")
    newest, older = RunFolder(tmp_path / "clean").checkpoints.newest_first()
    (newest / "state.json").write_text("{")
    assert [row["run_id"] for row in table(tmp_path, str(tmp_path / "clean"))] == logged.ids["clean"]
    assert "trying an older checkpoint" in capsys.readouterr().err
    (older / "state.json").unlink()
    with pytest.raises(ConfigError, match="no checkpoint tells which MLflow run"):
        compare.main([str(tmp_path / "clean")])


def test_a_store_that_refuses_connections_exits_with_2_and_its_words(tmp_path, capsys):
    arguments = ["clean", "--tracking-uri", "http://someone:secret@127.0.0.1:9", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        cli.exit_with(lambda _: compare.main(arguments))
    assert left.value.code == cli.EXIT_USAGE
    captured = capsys.readouterr()
    assert "error: MLflow at http://***@127.0.0.1:9: " in captured.err
    assert "Connection refused" in captured.err
    assert "secret" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_a_mistaken_address_makes_no_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with sqlite3.connect("other.db") as database:
        database.execute("CREATE TABLE fruit (name TEXT)")
    database.close()
    before = Path("other.db").read_bytes()
    with pytest.raises(ConfigError, match=r"sqlite:////.*/mlflow\.db: there is no MLflow store"):
        compare.main(["clean"])
    for uri in ("sqlite:///no/folder/x.db", "sqlite:///other.db", "sqlite://", "nowhere", "file:///no/folder"):
        with pytest.raises(ConfigError, match=f"{uri}: there is no MLflow store"):
            compare.main(["clean", "--tracking-uri", uri])
    assert [path.name for path in tmp_path.iterdir()] == ["other.db"]
    assert Path("other.db").read_bytes() == before
