"""Rollout actors that come and go with the nodes of a cluster of several raylets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from actors.rollout import ActorsConfig
from distributed.rollout_pool import rollout_room
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("actors", "nodes", "room"),
    [
        ({}, {"d": {"CPU": 4.0}}, 6),  # (4 - 1) / .5
        ({}, {"d": {"CPU": 4.0}, "w": {"CPU": 2.0}}, 10),
        ({"num_cpus": 0.75}, {"d": {"CPU": 2.0}, "w": {"CPU": 2.0}}, 3),  # 1.25 / .75 and 2 / .75, each rounded down
        ({}, {"d": {"CPU": 0.5}}, 1),  # never none
        ({"max_rollout_actors": 3}, {"d": {"CPU": 1.0}, "w": {"CPU": 64.0}}, 3),
        ({"rollout_resource": "cpu_node"}, {"d": {"CPU": 64.0}, "w": {"CPU": 2.0, "cpu_node": 1.0}}, 4),
        ({"num_cpus": 0}, {"d": {"CPU": 4.0}}, 3),
        ({"num_cpus": 0.1}, {"d": {"CPU": 1.3}}, 3),  # binary fractions must not cost an actor
    ],
)
def test_room(actors, nodes, room):
    assert rollout_room(nodes, "d", ActorsConfig(num_rollout_actors="auto", **actors)) == room


def records(folder: Path) -> list[dict]:
    file = folder / "runs" / "auto" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [record for record in map(json.loads, lines) if "num_rollout_actors" in record]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_actors_come_and_go_with_the_nodes(in_tmp_path, toy, monkeypatch):
    """One node, then two, then one again: the run goes on, and every trajectory is accounted for."""
    config = toy(
        **{
            "run.backend": "ray", "run.num_learner_steps": 100_000, "run.max_seconds": 200, "run.name": "auto",
            "oracle.function": "tests.oracles:slow", "actors.num_rollout_actors": "auto", "actors.max_restarts": 0,
            "actors.num_cpus": 1, "evaluation.every_steps": 10_000, "oracle.cache_size": 0,
        }
    )  # fmt: skip
    (in_tmp_path / "auto.yaml").write_text(config.to_yaml())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where the nodes find the oracle
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100_000_000})
    try:
        command = [sys.executable, "-m", "distributed.run", "auto.yaml", "--run.address", cluster.address]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with open(in_tmp_path / "stderr.txt", "w") as log:
            process = subprocess.Popen(command, cwd=in_tmp_path, env=environment, stderr=log, stdout=log)
        patience = {"seconds": 120, "process": process, "why": (in_tmp_path / "stderr.txt").read_text}
        wait_for(lambda: bool(records(in_tmp_path)), **patience)
        assert records(in_tmp_path)[-1]["num_rollout_actors"] == 1
        node = cluster.add_node(num_cpus=2, object_store_memory=100_000_000)
        wait_for(lambda: records(in_tmp_path)[-1]["num_rollout_actors"] == 3, **patience)
        reached = records(in_tmp_path)[-1]["step"]
        wait_for(lambda: records(in_tmp_path)[-1]["step"] > reached + 60, **patience)
        node.all_processes["raylet"][0].process.kill()  # as if the host were gone
        wait_for(lambda: records(in_tmp_path)[-1]["num_rollout_actors"] == 1, **patience)
        reached = records(in_tmp_path)[-1]["step"]
        wait_for(lambda: records(in_tmp_path)[-1]["step"] > reached + 60, **patience)
        process.terminate()
        assert process.wait(120) == 130
    finally:
        cluster.shutdown()
    summary = json.loads((in_tmp_path / "runs" / "auto" / "summary.json").read_text())
    assert summary["num_restarts"] == 0  # a vanished node is no fault of its actors
    assert summary["num_sampled"] == summary["num_stored"] + summary["num_dropped"] + summary["num_in_flight"]
    assert summary["num_in_flight"] == 0
    versions = [record["policy_version"] for record in records(in_tmp_path)]
    assert versions == sorted(versions)
