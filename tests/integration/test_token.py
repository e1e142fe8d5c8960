"""Ray's token: a cluster that asks for another one says so, and the one that a local run makes is for its user only."""

import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml

from tests.conftest import TOY

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 100
"""On a busy machine; Ray tries for 20 before it takes a token for refused."""
pytestmark = pytest.mark.slow


class Cluster(NamedTuple):
    address: str
    token: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(home: Path, **changes: str) -> dict[str, str]:
    """That of a user with this home and no token but those in `changes`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    return inherited | {"HOME": str(home), "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", **changes}


def end(process: subprocess.Popen) -> None:
    """A process and those that it started, and none else: other clusters may run here."""
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs([member for member in family if isinstance(member, psutil.Process)], timeout=20)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of one node that asks for a token of its own."""
    home, folder, token = tmp_path_factory.mktemp("head"), Path(tempfile.mkdtemp(prefix="ray")), secrets.token_hex(32)
    (home / "token").write_text(token)
    ports = [f"--{name}={free_port()}" for name in ("port", "ray-client-server-port")]
    options = [f"--temp-dir={folder}", "--num-cpus=4", "--include-dashboard=false", "--object-store-memory=100000000"]
    variables = environment(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(home / "token"))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *ports, *options]
    with open(home / "log.txt", "w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline, started = time.monotonic() + PATIENCE_SECONDS, folder / "ray_current_cluster"
        while not (started.exists() and "Ray runtime started" in (home / "log.txt").read_text()):
            assert process.poll() is None, (home / "log.txt").read_text()
            assert time.monotonic() < deadline, (home / "log.txt").read_text()
            time.sleep(0.2)
        yield Cluster(started.read_text().strip(), token)
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def ended(folder: Path, *arguments: str, **changes: str) -> tuple[int, str, str]:
    """Exit code, output and log of a command in a folder that is also its user's home."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment(folder, **changes), capture_output=True, text=True,
        timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def toy_file(tmp_path: Path) -> Path:
    values: dict[str, Any] = TOY | {"run": {"num_learner_steps": 8, "name": "toy"}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "toy.yaml"


def test_a_cluster_that_refuses_the_token_says_so(cluster, tmp_path, toy_file):
    wrong = secrets.token_hex(32)
    given: dict[str, tuple[dict[str, str], str]] = {
        "wrong": ({"RAY_AUTH_TOKEN": wrong}, "refused the token in RAY_AUTH_TOKEN"),
        "none": ({}, "refused a connection without a token (there is no "),
        "off": ({"RAY_AUTH_MODE": "disabled"}, "refused a connection without a token (RAY_AUTH_MODE=disabled)"),
    }
    words = ("distributed.run", str(toy_file), "--run.address", cluster.address)
    for name, (changes, _) in given.items():
        code, output, log = ended(tmp_path / name, *words, **changes)
        assert code == 1, log
        assert f"run.address {cluster.address}: the Ray cluster {given[name][1]}" in log
        assert "~/.ray/auth_token of its head node" in log
        assert not any(token in output + log for token in (wrong, cluster.token))


def test_the_right_token_is_taken(cluster, tmp_path):
    words = ("distributed.doctor", "--json", "--address", cluster.address)
    _, output, log = ended(tmp_path / "right", *words, RAY_AUTH_TOKEN=cluster.token)
    findings = {finding["check"]: finding for finding in json.loads(output)}
    assert findings["cluster"]["verdict"] == "ok", log
    assert findings["cluster"]["found"].startswith("1 nodes, 4 CPUs")
    assert cluster.token not in output + log


def test_the_token_that_a_local_run_makes_is_for_its_user_only(tmp_path, toy_file):
    code, output, log = ended(tmp_path / "home", "distributed.run", str(toy_file))
    assert code == 0, log
    file = tmp_path / "home" / ".ray" / "auth_token"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file.parent, file)] == [0o700, 0o600]
    assert file.read_text() not in output + log
    for path in (tmp_path / "home" / "runs").rglob("*"):
        assert path.is_dir() or not path.stat().st_mode & 0o111
