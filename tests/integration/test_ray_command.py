"""`python -m distributed.run` as a user starts it: its own Ray, killed processes, Ctrl-C, resume."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.waiting import wait_for

SMALL = [
    word
    for key, value in (
        ("network.hidden_size", "32"), ("network.num_layers", "2"), ("network.kmer_sizes", "[]"),
        ("tracking.mlflow", "false"), ("run.name", "r"),
    )
    for word in (f"--{key}", value)
]  # fmt: skip
PATIENCE_SECONDS = 120


def start(*arguments: str, folder: Path, config: Sequence[str] = SMALL) -> subprocess.Popen:
    """The command in a process group of its own, as a terminal starts it."""
    command = [sys.executable, "-m", "distributed.run", *config, *arguments]
    with open(folder / "stderr.txt", "a") as stderr, open(folder / "stdout.txt", "a") as stdout:
        return subprocess.Popen(command, cwd=folder, stderr=stderr, stdout=stdout, start_new_session=True)


def step_reached(folder: Path) -> int:
    lines = (
        (folder / "runs/r/metrics.jsonl").read_text().splitlines() if (folder / "runs/r/metrics.jsonl").exists() else []
    )
    return json.loads(lines[-1])["step"] if lines else 0


def saved_step(folder: Path) -> int:
    return max((int(path.name.split("_")[1]) for path in (folder / "runs/r/checkpoints").glob("step_*")), default=0)


def actors(parent: subprocess.Popen, name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(parent.pid).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def resume(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "distributed.run", "--resume", "runs/r", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def summary(folder: Path) -> dict:
    """The run's summary, in which every trajectory is accounted for."""
    result = json.loads((folder / "runs/r/summary.json").read_text())
    assert result["num_sampled"] == result["num_stored"] + result["num_dropped"] + result["num_in_flight"]
    return result


def test_a_run_survives_the_death_of_every_actor_and_ctrl_c(tmp_path):
    """kill -9 of a rollout actor, the learner and the buffer; then Ctrl-C, and a resume that ends as asked."""
    arguments = ["--run.num_learner_steps", "100000", "--run.save_every_seconds", "2"]
    process = start(*arguments, "--actors.num_rollout_actors", "2", folder=tmp_path)
    for name in ("RolloutActor", "LearnerActor", "ReplayBufferActor"):
        before = step_reached(tmp_path)
        wait_for(lambda before=before: step_reached(tmp_path) > before + 60, seconds=PATIENCE_SECONDS)
        actors(process, name)[0].kill()
    log = tmp_path / "stderr.txt"
    wait_for(lambda: log.read_text().count("restart 1 of at most 5") == 3, seconds=PATIENCE_SECONDS)
    before = step_reached(tmp_path)
    wait_for(lambda: step_reached(tmp_path) > before + 60, seconds=PATIENCE_SECONDS)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    assert process.wait(PATIENCE_SECONDS) == 130
    first = summary(tmp_path)
    assert first["status"] == "interrupted"
    assert first["num_restarts"] == 3
    assert before < first["num_learner_steps"] < 100000
    assert "rollout" in log.read_text()
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running()]

    target = first["num_learner_steps"] + 60
    done = resume(tmp_path, "--run.num_learner_steps", str(target))
    assert done.returncode == 0, done.stderr
    second = summary(tmp_path)
    assert second["status"] == "done"
    assert second["num_learner_steps"] >= target
    assert second["num_sampled"] > first["num_sampled"]
    assert second["seeds"].items() > first["seeds"].items()  # those of both sessions
    assert "exact_tv" in done.stdout
    assert "run folder" not in done.stderr.splitlines()[-1]


def test_a_killed_driver_leaves_a_checkpoint_that_resumes_and_is_terminated(tmp_path):
    process = start("--run.num_learner_steps", "100000", "--run.save_every_seconds", "1", folder=tmp_path)
    wait_for(lambda: saved_step(tmp_path) > 0, seconds=PATIENCE_SECONDS)
    process.kill()
    process.wait()
    saved = saved_step(tmp_path)
    process = start("--resume", "runs/r", folder=tmp_path, config=())
    wait_for(lambda: saved_step(tmp_path) > saved + 40, seconds=PATIENCE_SECONDS)
    process.terminate()
    assert process.wait(PATIENCE_SECONDS) == 130
    result = summary(tmp_path)
    assert result["status"] == "interrupted"
    assert saved + 40 < result["num_learner_steps"] < 100000


def test_no_cluster_at_the_address_is_a_clear_error(tmp_path):
    command = [sys.executable, "-m", "distributed.run", *SMALL, "--run.address", "127.0.0.1:1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 1
    assert "no Ray cluster answered" in done.stderr
