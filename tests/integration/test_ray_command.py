"""`python -m distributed.run` as a user starts it: its own Ray, killed processes, Ctrl-C, resume."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

SMALL = [
    word
    for key, value in (
        ("network.hidden_size", "32"), ("network.num_layers", "2"), ("network.kmer_sizes", "[]"),
        ("tracking.mlflow", "false"), ("run.name", "r"),
    )
    for word in (f"--{key}", value)
]  # fmt: skip
PATIENCE_SECONDS = 120


def start(*arguments: str, folder: Path) -> subprocess.Popen:
    """The command in a process group of its own, as a terminal starts it."""
    command = [sys.executable, "-m", "distributed.run", *SMALL, *arguments]
    with open(folder / "stderr.txt", "a") as stderr, open(folder / "stdout.txt", "a") as stdout:
        return subprocess.Popen(command, cwd=folder, stderr=stderr, stdout=stdout, start_new_session=True)


def wait_for(condition: Callable[[], object]) -> object:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")


def step_reached(folder: Path) -> int:
    lines = (
        (folder / "runs/r/metrics.jsonl").read_text().splitlines() if (folder / "runs/r/metrics.jsonl").exists() else []
    )
    return json.loads(lines[-1])["step"] if lines else 0


def actors(parent: subprocess.Popen, name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(parent.pid).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_run_survives_the_death_of_every_actor(tmp_path):
    """kill -9 of a rollout actor, the learner and the buffer; the run ends as asked, every trajectory accounted for."""
    arguments = ["--run.num_learner_steps", "1500", "--run.save_every_seconds", "2", "--actors.num_rollout_actors", "2"]
    process = start(*arguments, folder=tmp_path)
    for name in ("RolloutActor", "LearnerActor", "ReplayBufferActor"):
        before = step_reached(tmp_path)
        wait_for(lambda before=before: step_reached(tmp_path) > before + 60)
        children = psutil.Process(process.pid).children(recursive=True)
        actors(process, name)[0].kill()
    assert process.wait(PATIENCE_SECONDS) == 0
    result = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert result["status"] == "done"
    assert result["num_restarts"] == 3
    assert result["num_sampled"] == result["num_stored"] + result["num_dropped"] + result["num_in_flight"]
    assert result["num_learner_steps"] >= 1500
    log = (tmp_path / "stderr.txt").read_text()
    assert "rollout" in log
    assert log.count("restart 1 of at most 5") == 3
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_resumes(tmp_path, number):
    process = start("--run.num_learner_steps", "100000", folder=tmp_path)
    wait_for(lambda: step_reached(tmp_path) > 40)
    if number == signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    else:
        process.terminate()
    assert process.wait(PATIENCE_SECONDS) == 130
    first = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert first["status"] == "interrupted"
    assert 40 < first["num_learner_steps"] < 100000
    target = first["num_learner_steps"] + 60
    command = [sys.executable, "-m", "distributed.run", "--resume", "runs/r", "--run.num_learner_steps", str(target)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    second = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert second["num_learner_steps"] >= target
    assert second["num_sampled"] > first["num_sampled"]
    assert second["num_sampled"] == second["num_stored"] + second["num_dropped"] + second["num_in_flight"]
    assert "exact_tv" in done.stdout
    assert "run folder" not in done.stderr.splitlines()[-1]


def test_killed_driver_leaves_a_checkpoint_that_resumes(tmp_path):
    process = start("--run.num_learner_steps", "100000", "--run.save_every_seconds", "1", folder=tmp_path)
    folder = tmp_path / "runs/r/checkpoints"
    saved = wait_for(lambda: max((int(p.name.split("_")[1]) for p in folder.glob("step_*")), default=0))
    process.kill()
    process.wait()
    command = [
        sys.executable,
        "-m",
        "distributed.run",
        "--resume",
        "runs/r",
        "--run.num_learner_steps",
        str(saved + 40),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert result["num_sampled"] == result["num_stored"] + result["num_dropped"] + result["num_in_flight"]


def test_no_cluster_at_the_address_is_a_clear_error(tmp_path):
    command = [sys.executable, "-m", "distributed.run", *SMALL, "--run.address", "127.0.0.1:1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 1
    assert "no Ray cluster answered" in done.stderr
