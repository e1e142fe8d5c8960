import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distributed import doctor
from tests.mlflow_server import free_port

ROOT = Path(__file__).parents[3]


def found(check, name):
    return next(finding for finding in check() if finding.check == name)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_this_machine_has_what_a_run_needs(home, capsys):
    assert doctor.main(["--json"]) == 0
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {"Python", "package", "torch", "GPU", "Ray", "Ray token", "MLflow", "disk", "memory"} <= set(findings)
    assert findings["package"]["found"] == str(Path(doctor.__file__).parent)
    assert doctor.main([]) == 0
    assert "what to do" in capsys.readouterr().out


def test_the_token_must_be_there_private_and_in_use(home, monkeypatch):
    assert found(doctor.check_ray, "Ray token").verdict == "note"
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    finding = found(doctor.check_ray, "Ray token")
    assert (finding.verdict, finding.advice) == ("note", f"chmod 600 {token}")
    token.chmod(0o600)
    assert found(doctor.check_ray, "Ray token").verdict == "ok"
    assert "secret" not in str(list(doctor.check_ray()))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    finding = found(doctor.check_ray, "Ray token")
    assert finding.verdict == "wrong"
    assert doctor.main([]) == 1


def test_a_port_in_use_is_noted(monkeypatch):
    port = free_port()
    monkeypatch.setattr(doctor, "PORTS", {port: "somebody"})
    assert found(doctor.check_ports, f"port {port}").verdict == "ok"
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        assert found(doctor.check_ports, f"port {port}").found == "in use (somebody)"


def test_a_store_that_does_not_answer_is_noted_without_its_password(home, monkeypatch):
    assert "will be made" in found(doctor.check_mlflow, "MLflow").found
    assert not (home / "mlflow.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    finding = found(doctor.check_mlflow, "MLflow")
    assert finding.verdict == "note"
    assert "refused" in finding.found
    assert "secret" not in str(finding)
    (home / "notes.db").write_text("no database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///notes.db")
    assert "there is no MLflow store" in found(doctor.check_mlflow, "MLflow").found


def test_too_little_room_is_noted(home, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_DISK", 2**62)
    monkeypatch.setattr(doctor, "MIN_MEMORY", 2**62)
    monkeypatch.setattr(doctor, "MIN_SHARED", 2**62)
    assert {finding.check: finding.verdict for finding in doctor.check_room()} == {
        "disk": "note", "memory": "note", "shared memory": "note",
    }  # fmt: skip


def test_a_package_of_the_same_name_is_told_from_ours(monkeypatch, tmp_path):
    (tmp_path / "distributed").mkdir()
    (tmp_path / "distributed" / "__init__.py").write_text("")
    spec = type("Spec", (), {"origin": str(tmp_path / "distributed" / "__init__.py")})
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    finding = found(doctor.check_python, "package")
    assert finding.verdict == "wrong"
    assert "PYTHONPATH" in finding.advice


def test_a_cluster_that_does_not_answer_is_wrong(home):
    command = [sys.executable, "-m", "distributed.doctor", "--json", "--address", f"127.0.0.1:{free_port()}"]
    done = subprocess.run(
        command, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    finding = next(f for f in json.loads(done.stdout) if f["check"] == "cluster")
    assert finding["verdict"] == "wrong"
    assert "no Ray cluster answered" in finding["found"]
