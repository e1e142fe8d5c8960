"""Tracking on a real MLflow store."""

import json
import os
import subprocess
import sys
import threading
import time

import mlflow.pyfunc
import pandas
import pytest
from mlflow.tracking import MlflowClient

from distributed import api, tracking
from distributed.mlflow_store import tracking_uri
from distributed.run import newest_readable, train
from distributed.run_folder import RunFolder
from tests.mlflow_server import free_port, mlflow_server


def one_run(client: MlflowClient, experiment: str = "default"):
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id])
    assert len(runs) == 1
    return runs[0]


def test_a_fresh_sqlite_store_gets_parameters_metrics_artifacts_and_status(in_tmp_path, toy):
    config = toy(**{"tracking.mlflow": True, "tracking.experiment": "toys"})
    assert train(config, None, None, None) == 0
    client = MlflowClient(tracking_uri(config))
    run = one_run(client, "toys")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "toy"
    assert run.data.params["environment.noise"] == "0.2"
    assert run.data.params["objective.name"] == "subtb"
    summary = json.loads(RunFolder(config.run.output_folder / "toy").summary_file.read_text())
    assert run.data.metrics["final_exact_tv"] == pytest.approx(summary["exact_tv"])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [m.step for m in history] == sorted({m.step for m in history})
    assert len(history) >= 10
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "summary.json", "plots", "model"}
    assert [a.path for a in client.list_artifacts(run.info.run_id, "model")] == ["model/learner.pt"]


def test_the_trained_sampler_is_a_model_from_which_mlflow_samples(in_tmp_path, toy, monkeypatch):
    """By MLflow's own command, in a folder and with a search path where only the model has our code."""
    run = api.train(
        toy(
            **{
                "tracking.mlflow": True,
                "oracle.name": "tfbind8",
                "environment.alphabet": "ACGT",
                "environment.length": 8,
            }
        )
    )
    client = MlflowClient(tracking_uri(run.config))
    logged = one_run(client)
    (model,) = logged.outputs.model_outputs
    assert client.get_logged_model(model.model_id).status == "READY"
    (in_tmp_path / "asked.csv").write_text("n\n5\n2\n")
    command = [
        "-m",
        "mlflow",
        "models",
        "predict",
        "-m",
        f"runs:/{logged.info.run_id}/sampler",
        "-i",
        "asked.csv",
        "-t",
        "csv",
    ]
    hidden = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = hidden | {"MLFLOW_TRACKING_URI": tracking_uri(run.config), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--env-manager", "local"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout[done.stdout.index("{") :])["predictions"]
    expected = [run.sample(5, seed=0), run.sample(2, seed=1)]
    assert [row["sequence"] for row in rows] == [s for samples in expected for s in samples.sequences]
    assert [row["score"] for row in rows] == pytest.approx([float(s) for samples in expected for s in samples.scores])
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which MLflow adds the model's code
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(run.config))
    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    table = loaded.predict(pandas.DataFrame({"n": [3], "seed": [7]}))
    assert table["sequence"].tolist() == run.sample(3, seed=7).sequences


def test_a_model_that_cannot_be_logged_costs_only_the_model(in_tmp_path, toy, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise RuntimeError("models are not known here")

    monkeypatch.setattr(tracking, "log_sampler", refuse)
    config = toy(**{"tracking.mlflow": True})
    assert train(config, None, None, None) == 0
    assert "models are not known here" in caplog.text
    assert one_run(MlflowClient(tracking_uri(config))).info.status == "FINISHED"


def test_a_resumed_run_continues_its_mlflow_run(in_tmp_path, toy):
    config = toy(**{"tracking.mlflow": True})
    train(config, None, None, None)
    folder = RunFolder(config.run.output_folder / "toy")
    longer = folder.load_config([("run.num_learner_steps", "40")])
    assert train(longer, folder, *newest_readable(folder, longer)) == 0
    client = MlflowClient(tracking_uri(config))
    run = one_run(client)
    assert run.info.status == "FINISHED"
    assert max(m.step for m in client.get_metric_history(run.info.run_id, "loss")) >= 38


def test_a_store_that_is_down_neither_stops_nor_slows_training(in_tmp_path, toy, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    config = toy(**{"tracking.mlflow": True})
    assert train(config, None, None, None) == 0
    folder = RunFolder(config.run.output_folder / "toy")
    assert len(list(folder.read_metrics())) >= 10
    assert "in time" in caplog.text or "unreachable" in caplog.text
    deadline = time.monotonic() + 60
    while any(thread.name == "mlflow" for thread in threading.enumerate()):  # it gives up, rather than try for ever
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_what_a_server_missed_while_it_was_down_is_sent_when_it_returns(in_tmp_path, toy):
    """The run starts without a server, which comes up while the tracker waits."""
    port = free_port()
    config = toy(**{"tracking.mlflow_uri": f"http://127.0.0.1:{port}"})
    tracker = tracking.MlflowTracker(config, run_key="k")
    tracker.log(1, {"loss": 3.0})
    time.sleep(3)
    assert tracker.run_id is None
    with mlflow_server(in_tmp_path, port) as address:
        deadline = time.monotonic() + 90
        while tracker.run_id is None and time.monotonic() < deadline:
            time.sleep(0.5)
        assert tracker.run_id is not None
        tracker.close("done", [], {"num_learner_steps": 1})
        client = MlflowClient(address)
        run = one_run(client)
        assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 3.0)


def test_a_sweep_is_told_that_its_store_is_down_and_goes_on(toy, caplog):
    config = toy(**{"tracking.mlflow": True, "tracking.mlflow_uri": "http://127.0.0.1:9"})
    tracker = tracking.SweepTracker(config, "key", "name", {})
    tracker.close("done", {}, [], {})
    assert tracker.run_id is None
    assert "the sweep goes on without" in caplog.text
    assert "refused" in caplog.text


def test_whatever_ended_a_trial_its_run_says_so(in_tmp_path, toy):
    config = toy(**{"tracking.mlflow": True, "tracking.experiment": "ended"})
    tracker = tracking.SweepTracker(config, "key", "sweep", {"reward": {"exponent": 2}})
    client = MlflowClient(tracking_uri(config))
    experiment = client.get_experiment_by_name("ended").experiment_id
    statuses = {
        "done": "FINISHED",
        "stopped": "FINISHED",
        "interrupted": "KILLED",
        "failed": "FAILED",
        "unknown": "KILLED",
    }
    for name in statuses:  # all of them were killed before they could say how they ended
        tags = {"run_key": f"key/{name}", "mlflow.parentRunId": tracker.run_id}
        client.create_run(experiment, tags=tags, run_name=name)
    unlisted = client.create_run(experiment, tags={"mlflow.parentRunId": tracker.run_id}, run_name="long done")
    client.set_terminated(unlisted.info.run_id, "FINISHED")
    tracker.close("done", {f"key/{name}": name for name in statuses if name != "unknown"}, [], {"best_excess_kl": 0.1})
    found = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert {name: found[name].info.status for name in statuses} == statuses
    assert found["long done"].info.status == "FINISHED"  # of which this session knew nothing
    assert found["stopped"].data.tags["ended"] == "stopped"
    assert (found["sweep"].info.status, found["sweep"].data.metrics) == ("FINISHED", {"best_excess_kl": 0.1})
    again = tracking.SweepTracker(config, "key", "sweep", {})
    assert again.run_id == tracker.run_id
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
