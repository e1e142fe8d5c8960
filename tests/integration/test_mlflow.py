"""Tracking on a real MLflow store."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from mlflow.tracking import MlflowClient

from distributed import tracking
from distributed.run import newest_readable, train
from distributed.run_folder import RunFolder


def one_run(client: MlflowClient, experiment: str = "default"):
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id])
    assert len(runs) == 1
    return runs[0]


def test_a_fresh_sqlite_store_gets_parameters_metrics_artifacts_and_status(in_tmp_path, toy):
    config = toy(**{"tracking.mlflow": True, "tracking.experiment": "toys"})
    assert train(config, None, None, None) == 0
    client = MlflowClient("sqlite:///mlflow.db")
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


def test_a_resumed_run_continues_its_mlflow_run(in_tmp_path, toy):
    config = toy(**{"tracking.mlflow": True})
    train(config, None, None, None)
    folder = RunFolder(config.run.output_folder / "toy")
    longer = folder.load_config([("run.num_learner_steps", "40")])
    assert train(longer, folder, *newest_readable(folder, longer)) == 0
    client = MlflowClient("sqlite:///mlflow.db")
    run = one_run(client)
    assert run.info.status == "FINISHED"
    assert max(m.step for m in client.get_metric_history(run.info.run_id, "loss")) >= 38


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{in_tmp_path}/server.db",
        "--artifacts-destination",
        str(in_tmp_path),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 90
        while tracker.run_id is None and time.monotonic() < deadline:
            time.sleep(0.5)
        assert tracker.run_id is not None
        tracker.close("done", [], {"num_learner_steps": 1})
        client = MlflowClient(f"http://127.0.0.1:{port}")
        run = one_run(client)
        assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 3.0)
    finally:
        for child in psutil.Process(server.pid).children(recursive=True):
            child.kill()
        server.kill()
        server.wait()
