"""What a user does on the machine from which a cluster is started: up, run, look, fetch, down. Runs inside lab.sh."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

LAB, RESULTS, PROJECT = Path(os.environ["LAB"]), Path(os.environ["RESULTS"]), Path(os.environ["PROJECT"])
sys.path.insert(0, str(PROJECT))
HOSTS = {"head": "10.77.0.10", "worker1": "10.77.0.11", "worker2": "10.77.0.12"}
RAY = str(Path(sys.executable).with_name("ray"))
CONFIG = "/tmp/cluster.yaml"
RUN = (
    "cd ~/sequence-flows && MLFLOW_TRACKING_URI=http://127.0.0.1:5000 ~/venv/bin/python -m distributed.run "
    "--run.address auto --run.name lab --run.num_learner_steps 100000 --run.max_seconds 300 --run.save_every_seconds 3 "
    "--actors.num_rollout_actors auto --actors.max_rollout_actors 4 --actors.rollout_resource rollout --actors.num_cpus 1 "
    "--actors.batch_size 256 --network.hidden_size 32 --network.num_layers 2 --evaluation.every_steps 100000 "
    "--tracking.log_every_steps 5"
)


def host_file(host: str, path: str) -> Path:
    """A file of a host, seen from here."""
    return Path(f"/proc/{(LAB / f'{host}.pid').read_text().strip()}/root{path}")


def ray(*arguments: str, log: str, timeout: float = 300) -> int:
    """A command of `ray`, its output kept in the results."""
    with open(RESULTS / log, "w") as file:
        command = [RAY, arguments[0], "-y", *arguments[1:]] if arguments[0] in ("up", "down") else [RAY, *arguments]
        return subprocess.run(
            command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=timeout
        ).returncode


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.5)


def records() -> list[dict]:
    """What the run has recorded so far."""
    file = host_file("head", "/root/sequence-flows/runs/lab/metrics.jsonl")
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if "num_rollout_actors" in line]


def actors() -> float:
    found = records()
    return found[-1]["num_rollout_actors"] if found else 0


def steps() -> int:
    found = records()
    return found[-1]["step"] if found else 0


def main() -> None:
    from tests.cluster.derive import for_hosts

    facts: dict[str, object] = {}
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    values = for_hosts(PROJECT / "cluster.yaml", HOSTS["head"], [HOSTS["worker1"], HOSTS["worker2"]], LAB / "key")
    Path(CONFIG).write_text(yaml.safe_dump(values))
    facts["up"] = ray("up", "--no-config-cache", CONFIG, log="up.log")
    with open(RESULTS / "run.log", "w") as log:
        run = subprocess.Popen([RAY, "exec", CONFIG, RUN], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for(lambda: actors() == 4, "four rollout actors on two workers")
        facts["steps_with_four"] = steps()
        before = steps()
        wait_for(lambda: steps() > before + 20, "the run goes on")
        os.kill(int((LAB / "worker1.pid").read_text()), signal.SIGKILL)
        wait_for(lambda: actors() == 2, "the actors of the dead host are given up")
        before = steps()
        wait_for(lambda: steps() > before + 20, "the run goes on with the other host")
        facts["nodes"] = subprocess.run(
            [RAY, "exec", CONFIG, "~/venv/bin/python -m distributed.doctor --address auto --json"],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
        ).stdout if (PROJECT / "distributed" / "doctor.py").exists() else ""  # fmt: skip
        subprocess.run(
            [RAY, "exec", CONFIG, "pkill -INT -f 'm distributed.[r]un'"], stdin=subprocess.DEVNULL, timeout=120
        )
        facts["run"] = run.wait(120)
    finally:
        run.kill()
        folder = host_file("head", "/root/sequence-flows/runs/lab")
        if folder.exists():
            shutil.copytree(folder, RESULTS / "lab", dirs_exist_ok=True)
        for name in ("mlflow.log", "mlflow.db", "mlflow.db-wal"):
            if host_file("head", f"/root/{name}").exists():
                shutil.copy(host_file("head", f"/root/{name}"), RESULTS / name)
    facts["fetched"] = ray("rsync-down", CONFIG, "/root/sequence-flows/runs/lab/", "/tmp/fetched/", log="rsync.log")
    facts["fetched_files"] = sorted(path.name for path in Path("/tmp/fetched").glob("*"))
    facts["down"] = ray("down", CONFIG, log="down.log")
    left = subprocess.run(["nsenter", "-t", (LAB / "head.pid").read_text().strip(), "-p", "-m", "ps", "ax"],
                          capture_output=True, text=True).stdout  # fmt: skip
    facts["left"] = [line for line in left.splitlines() if "raylet" in line or "gcs_server" in line]
    (RESULTS / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
