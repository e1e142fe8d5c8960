"""cluster.yaml, started with `ray up` over three hosts on this machine, one of which is killed."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from tests.cluster.derive import for_hosts

ROOT = Path(__file__).parents[2]
TOOLS = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "rsync", "sshd")


def missing() -> str:
    """Why the lab cannot be built here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "true"], capture_output=True
    )
    return "" if tried.returncode == 0 else "namespaces are not permitted here"


def test_only_provider_way_in_and_hosts_differ_on_premises():
    cloud = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    lab = for_hosts(ROOT / "cluster.yaml", "10.0.0.1", ["10.0.0.2"], Path("/key"))
    same = {"cluster_name", "file_mounts", "setup_commands", "head_start_ray_commands", "worker_start_ray_commands"}
    assert {key: cloud[key] for key in same} == {key: lab[key] for key in same}
    assert set(lab) - set(cloud) == {"min_workers"}
    assert set(cloud) - set(lab) == {"available_node_types", "head_node_type"}


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_up_run_lose_a_host_fetch_and_ray_down(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    results = Path(
        subprocess.run(["mktemp", "-d", "/var/tmp/labresults.XXXXXX"], capture_output=True, text=True).stdout.strip()
    )
    venv = Path(sys.prefix)
    kept = [str(venv), str(Path(sys.base_prefix)), str(ROOT)]
    environment = {
        "PATH": f"{venv}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root", "VENV": str(venv), "RESULTS": str(results), "PROJECT": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    try:
        command = ["bash", str(ROOT / "tests/cluster/lab.sh"), ":".join(kept), sys.executable]
        done = subprocess.run(
            [*command, str(ROOT / "tests/cluster/launcher.py")],
            env=environment, capture_output=True, text=True, timeout=850,
        )  # fmt: skip
        logs = "\n".join(f"== {file.name}\n{file.read_text()[-2500:]}" for file in sorted(results.glob("*.log")))
        assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}\n{logs}"
        facts = json.loads((results / "facts.json").read_text())
        assert (facts["up"], facts["fetched"], facts["down"]) == (0, 0, 0), logs
        assert "summary.json" in facts["fetched_files"]
        assert not facts["left"]
        summary = json.loads((results / "lab" / "summary.json").read_text())
        assert summary["status"] == "interrupted"
        assert summary["num_sampled"] == summary["num_stored"] + summary["num_dropped"] + summary["num_in_flight"]
        assert summary["num_restarts"] == 0
        versions = [
            json.loads(line).get("policy_version") for line in (results / "lab/metrics.jsonl").read_text().splitlines()
        ]
        versions = [version for version in versions if version is not None]
        assert versions == sorted(versions)
        with closing(sqlite3.connect(results / "mlflow.db")) as store:
            assert store.execute("SELECT name, status FROM runs").fetchall() == [("lab", "KILLED")], logs
    finally:
        shutil.rmtree(results, ignore_errors=True)
