"""cluster.yaml, started with `ray up` over three hosts on this machine, to which one mishap after another happens."""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
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


def records(folder: Path) -> list[dict]:
    """Whole lines of metrics.jsonl; a full disk may have cut one short."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [record for record in found if "policy_version" in record]


def check_books(folder: Path) -> dict:
    """Every trajectory accounted for, none stored twice, versions that only rise within a session; the summary."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["num_sampled"] == summary["num_stored"] + summary["num_dropped"] + summary["num_in_flight"]
    assert summary["num_in_flight"] == 0
    newest = max((folder / "checkpoints").glob("step_*"))
    with np.load(newest / "replay_buffer.npz") as saved:
        # a batch is known by its seed, which no two share; one of those kept may be evicted in part
        _, counts = np.unique(saved["online_seed"], return_counts=True)
        assert counts.max() <= 256
        assert len(saved["online_seed"]) == min(summary["num_stored"], 20_000)
    return summary


def check(results: Path, logs: str) -> None:
    """What the launcher left behind, against what must hold after every mishap."""
    facts = json.loads((results / "facts.json").read_text())
    assert (facts["up"], facts["up_again"], facts["fetched"], facts["down"]) == (0, 0, 0, 0), logs
    assert "summary.json" in facts["fetched_files"]
    assert not facts["left"]
    findings, _ = json.JSONDecoder().raw_decode(facts["nodes"], facts["nodes"].index("[\n"))
    nodes = next(finding for finding in findings if finding["check"] == "cluster")
    assert nodes["found"].startswith("3 nodes")

    early, late = facts["memory"]
    assert late < 1.2 * early

    lab = results / "runs" / "lab"
    summary = check_books(lab)
    assert summary["num_restarts"] == 2  # buffer and learner; those that died with their host do not count
    found = records(lab)
    versions = [record["policy_version"] for record in found]
    falls = [i for i in range(1, len(versions)) if versions[i] < versions[i - 1]]
    assert len(falls) <= 2  # where a new driver went on from the newest checkpoint
    for fall in falls:  # saved every 3 s
        assert found[fall - 1]["wall_seconds"] - found[fall]["wall_seconds"] <= 10
    assert max(record["num_waiting_batches"] for record in found) <= 9
    check_books(results / "runs" / "hanging")
    log = (results / "hanging.log").read_text()
    assert log.count("is given up") == 2
    assert "no answer within 1 s" in log
    with closing(sqlite3.connect(results / "mlflow.db")) as store:  # of the second head
        ended = dict(store.execute("SELECT name, status FROM runs").fetchall())
    assert ended == {"lab": "KILLED", "hanging": "KILLED"}, logs


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_on_three_hosts_survives_whatever_happens_to_them(tmp_path_factory):
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
            env=environment, capture_output=True, text=True, timeout=1450,
        )  # fmt: skip
        logs = "\n".join(f"== {file.name}\n{file.read_text()[-2500:]}" for file in sorted(results.glob("*.log")))
        assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}\n{logs}"
        check(results, logs)
    finally:
        shutil.rmtree(results, ignore_errors=True)
