"""`ray job submit` to a cluster of its own, as docs/cluster.md has it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml

from tests.conftest import TOY
from tests.mlflow_server import free_port
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
PATIENCE_SECONDS = 180
SETTINGS = dict(
    re.findall(
        r"\b(RAY_\w+)=(\S+?);?\s", yaml.safe_load((ROOT / "cluster.yaml").read_text())["head_start_ray_commands"][1]
    )
)
"""What cluster.yaml exports before the head starts."""


class Cluster(NamedTuple):
    """A head node, and what a user's shell knows of it."""

    address: str
    gcs: str
    environment: dict[str, str]

    def job(self, *arguments: str, seconds: float = PATIENCE_SECONDS) -> subprocess.CompletedProcess:
        """`ray job …`, from the project's folder."""
        command = [RAY, "job", arguments[0], "--address", self.address, *arguments[1:]]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=seconds
        )  # fmt: skip

    def submit(self, name: str, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        """Submit `python -m distributed.run` with the project's folder as the job's working directory."""
        arguments = ["--submission-id", name, "--working-dir", ".", *options]
        return self.job("submit", *arguments, "--", "python", "-m", "distributed.run", *words)

    def details(self, name: str) -> dict[str, Any]:
        """What the cluster says of a job."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"{self.address}/api/jobs/{name}", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that knows this checkout only from what jobs bring; its processes end with the test."""
    folder = Path(tempfile.mkdtemp(prefix="job", dir="/tmp"))  # short: Ray's sockets lie in it
    (folder / "token").write_text("0" * 32)
    (folder / "token").chmod(0o600)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH", "MLFLOW_"))}
    environment = kept | SETTINGS | {"RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    ports = ["--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port"]
    numbers = {option: free_port() for option in ports}
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        "--num-cpus=4",
    ]
    command += ["--temp-dir", str(folder / "ray"), "--object-store-memory", "300000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0", *(f"{option}={n}" for option, n in numbers.items())]
    log = open(folder / "head.log", "w")  # noqa: SIM115
    head = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        cluster = Cluster(
            f"http://127.0.0.1:{numbers['--dashboard-port']}", f"127.0.0.1:{numbers['--port']}", environment
        )
        wait_for(
            lambda: cluster.job("list").returncode == 0, why=(folder / "head.log").read_text, seconds=PATIENCE_SECONDS
        )
        yield cluster
    finally:
        started = [head, *psutil.Process(head.pid).children(recursive=True)]
        head.terminate()
        for process in psutil.wait_procs(started[1:], timeout=20)[1]:
            process.kill()
        head.kill()
        head.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def toy_file(folder: Path, **sections: dict[str, Any]) -> Path:
    """The toy's configuration for the cluster, its run folder in `folder`."""
    config = TOY | {"run": {"num_learner_steps": 24, "name": "toy", "address": "auto", "output_folder": str(folder)}}
    config = {key: value | sections.get(key, {}) for key, value in config.items()}
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "toy" / "summary.json").read_text())


def step_reached(folder: Path) -> int:
    file = folder / "toy" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_a_run_attaches_without_a_job(cluster, tmp_path):
    words = shlex.split("--run.name toy --run.num_learner_steps 24 --tracking.mlflow false --network.hidden_size 16")
    words += ["--run.output_folder", str(tmp_path), "--run.address", cluster.gcs]
    command = [sys.executable, "-m", "distributed.run", *words]
    environment = cluster.environment
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(tmp_path)["status"] == "done"


def test_no_job_without_the_token(cluster, tmp_path):
    (tmp_path / "token").write_text("1" * 32)
    stranger = cluster._replace(environment=cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})
    done = stranger.submit("stranger", "--print-config")
    assert done.returncode != 0
    assert "stranger" not in cluster.job("list").stdout


def test_ray_job_stop_saves_and_another_job_resumes(cluster, tmp_path):
    file = toy_file(tmp_path, run={"num_learner_steps": 1_000_000})
    started = cluster.submit("long", str(file), options=("--no-wait",))
    assert started.returncode == 0, started.stderr
    wait_for(lambda: step_reached(tmp_path) > 40, why=lambda: cluster.details("long"), seconds=PATIENCE_SECONDS)
    stopped = cluster.job("stop", "long")
    assert stopped.returncode == 0, stopped.stderr
    assert cluster.details("long")["status"] == "STOPPED"
    first = summary(tmp_path)
    assert first["status"] == "interrupted"
    assert first["mean_score"] > 0  # the last evaluation, although SIGTERM went to the oracle's process, too
    saved = max(path.name for path in (tmp_path / "toy" / "checkpoints").glob("step_*"))
    assert saved == f"step_{first['num_learner_steps']:09d}"
    target = first["num_learner_steps"] + 20
    words = ["--resume", str(tmp_path / "toy"), "--run.num_learner_steps", str(target)]
    resumed = cluster.submit("resumed", *words)
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    details = cluster.details("resumed")
    assert (details["status"], details["driver_exit_code"]) == ("SUCCEEDED", 0)
    second = summary(tmp_path)
    assert (second["status"], second["num_learner_steps"] >= target) == ("done", True)
    assert second["num_sampled"] > first["num_sampled"]
    assert second["num_sampled"] == second["num_stored"] + second["num_dropped"] + second["num_in_flight"]


def test_modules_that_the_job_brings_are_there_beside_ours(cluster, tmp_path):
    package = tmp_path / "assay"
    package.mkdir()
    (package / "__init__.py").write_text("def score(sequences):\n    return [len(s) / 8 for s in sequences]\n")
    file = toy_file(tmp_path, oracle={"function": "assay:score"})
    options = ("--runtime-env-json", json.dumps({"py_modules": [str(package)]}))
    done = cluster.submit("modules", str(file), options=options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert summary(tmp_path)["status"] == "done"


def test_a_config_error_fails_the_job(cluster, tmp_path):
    done = cluster.submit("lost", str(toy_file(tmp_path)), "--run.output_folder", "runs")
    assert done.returncode == 1
    assert "run.output_folder: runs is in the folder that Ray unpacked for this job" in done.stdout
    details = cluster.details("lost")
    assert (details["status"], details["driver_exit_code"]) == ("FAILED", 2)
    assert not (tmp_path / "toy").exists()
