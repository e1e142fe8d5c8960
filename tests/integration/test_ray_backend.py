"""The Ray backend inside this process, on one shared Ray runtime."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray

from distributed.backend import RunFailed
from distributed.checkpoints import CheckpointStore, load_sampler
from distributed.ray_backend import RayBackend
from distributed.run import newest_readable, train
from distributed.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("ray_session")


def summary(folder: RunFolder) -> dict:
    return json.loads(folder.summary_file.read_text())


def kill(slot) -> None:
    answer = ray.get(slot.handle.ready.remote())
    os.kill(answer[0] if isinstance(answer, tuple) else answer, signal.SIGKILL)


def steps(backend: RayBackend, count: int) -> None:
    done = 0
    while done < count:
        done += backend.step() is not None
        assert backend.accounting.balanced


@pytest.fixture
def backend(in_tmp_path, toy):
    backend = RayBackend(
        toy(**{"run.backend": "ray", "actors.num_rollout_actors": 2}), CheckpointStore(in_tmp_path / "checkpoints")
    )
    yield backend
    backend.close()


def test_the_toy_is_learned_on_ray(in_tmp_path, toy):
    """As on the serial backend: excess KL < 1e-3, by two rollout actors, a buffer and a learner."""
    changes = {
        "run.backend": "ray", "run.num_learner_steps": 1500, "network.hidden_size": 32, "learner.learning_rate": 5e-3,
        "learner.batch_size": 128, "actors.batch_size": 256, "actors.num_rollout_actors": 2, "dynamics.batch_size": 128,
        "dynamics.learning_rate": 5e-3, "evaluation.every_steps": 500,
    }  # fmt: skip
    config = toy(**changes)
    assert train(config, None, None, None) == 0
    folder = RunFolder(config.run.output_folder / "toy")
    result = summary(folder)
    assert result["excess_kl"] < 1e-3
    assert result["num_sampled"] == result["num_stored"] + result["num_dropped"] + result["num_in_flight"]
    records = [record for record in folder.read_metrics() if "policy_lag" in record]
    assert all(record["policy_lag_max"] <= config.actors.policy_lag_limit(2) for record in records)
    versions = [record["policy_version"] for record in records]
    assert versions == sorted(versions)
    with np.load(folder.checkpoints.newest_first()[0] / "replay_buffer.npz") as saved:
        stored = len(saved["online_scores"])
        # two actors, each with seeds of its own, none drawn twice
        assert len(np.unique(saved["online_seed"])) == stored // 256


def test_a_ray_run_resumes_with_its_counters_and_optimiser(in_tmp_path, toy):
    config = toy(**{"run.backend": "ray"})
    assert train(config, None, None, None) == 0
    folder = RunFolder(config.run.output_folder / "toy")
    before = summary(folder)
    longer = folder.load_config([("run.num_learner_steps", "60")])
    checkpoint, state = newest_readable(folder, longer)
    assert train(longer, folder, checkpoint, state) == 0
    after = summary(folder)
    assert after["num_learner_steps"] >= 60
    for counter in ("num_sampled", "num_trained", "policy_version", "wall_seconds", "cpu_seconds"):
        assert after[counter] > before[counter]
    assert after["num_sampled"] == after["num_stored"] + after["num_dropped"] + after["num_in_flight"]
    assert load_sampler(folder.path)[1].step == after["num_learner_steps"]


def test_killed_actors_are_replaced_and_nothing_is_counted_twice(backend):
    backend.start(None)
    steps(backend, 5)
    backend.store.write(5, backend.save)
    for victim in (backend._pool.slots[0], backend._learner, backend._buffer, backend._pool.slots[1]):
        version = backend.accounting.policy_version
        kill(victim)
        while victim.restarts == 0:  # the others go on until the loss is noticed
            backend.step()
        steps(backend, 5)
        assert victim.restarts == 1
        assert backend.accounting.policy_version > version
    accounting = backend.accounting
    assert accounting.num_restarts == 4
    backend.drain()
    assert accounting.balanced
    assert accounting.num_in_flight == 0
    stored = ray.get(backend._buffer.handle.statistics.remote())
    assert stored["buffer_num_added"] == accounting.num_stored
    assert stored["buffer_num_duplicates"] == 0


def test_a_killed_buffer_without_a_checkpoint_starts_empty(backend):
    backend.start(None)
    steps(backend, 4)
    before = backend.accounting.num_stored
    kill(backend._buffer)
    steps(backend, 4)
    assert backend.accounting.num_lost >= before > 0


def test_an_actor_that_dies_too_often_ends_the_run_with_the_cause(in_tmp_path, toy):
    config = toy(**{"run.backend": "ray", "actors.max_restarts": 1})
    backend = RayBackend(config, CheckpointStore(in_tmp_path / "checkpoints"))
    try:
        backend.start(None)
        steps(backend, 2)
        kill(backend._pool.slots[0])
        while backend.accounting.num_restarts == 0:
            backend.step()
        kill(backend._pool.slots[0])
        with pytest.raises(RunFailed, match="rollout 0 died 2 times"):
            steps(backend, 50)
    finally:
        backend.close()


def test_an_actor_that_does_not_answer_is_replaced(in_tmp_path, toy):
    config = toy(**{"run.backend": "ray", "actors.timeout_seconds": 10})
    backend = RayBackend(config, CheckpointStore(in_tmp_path / "checkpoints"))
    try:
        backend.start(None)
        slot = backend._pool.slots[0]
        process = ray.get(slot.handle.ready.remote())
        steps(backend, 2)
        os.kill(process, signal.SIGSTOP)
        while slot.restarts == 0:
            backend.step()
        steps(backend, 2)
        assert slot.incarnation == slot.restarts >= 1
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("function", "message"), [("always_nan", "no valid score"), ("always_raises", "the assay is on fire")]
)
def test_a_useless_oracle_ends_a_ray_run_with_its_cause(in_tmp_path, toy, function, message):
    changes = {"oracle.function": f"tests.oracles:{function}", "evaluation.exact": "never", "oracle.max_retries": 0}
    config = toy(**changes, **{"run.backend": "ray", "oracle.max_consecutive_failures": 3})
    assert train(config, None, None, None) == 1
    result = summary(RunFolder(config.run.output_folder / "toy"))
    assert result["status"] == "failed"
    assert message in result["error"]


def test_batches_that_come_too_late_are_stored_but_not_trained_on_as_fresh(in_tmp_path, toy):
    config = toy(**{"run.backend": "ray", "actors.max_policy_lag": 0})
    assert train(config, None, None, None) == 0
    folder = RunFolder(config.run.output_folder / "toy")
    result = summary(folder)
    assert result["num_stale"] > 0
    assert result["num_stored"] >= result["num_trained"] + result["num_stale"]
    assert all(record.get("policy_lag_max", 0) == 0 for record in folder.read_metrics())


def test_the_command_attaches_to_a_running_cluster(in_tmp_path, toy):
    """As on a cluster: Ray runs already, the command brings its own code along, and leaves Ray running."""
    (in_tmp_path / "toy.yaml").write_text(
        toy(**{"run.backend": "ray", "oracle.function": "tests.oracles:count_b"}).to_yaml()
    )
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "distributed.run", "toy.yaml", "--run.address", address]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=in_tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ray.cluster_resources()["CPU"] == 8
    too_many = [*command, "--actors.num_rollout_actors", "100", "--run.name", "more"]
    done = subprocess.run(too_many, cwd=in_tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "actors.num_rollout_actors: 100 actors" in done.stderr


def test_an_actor_that_dies_during_the_prefill_is_replaced(in_tmp_path, toy):
    (in_tmp_path / "known.csv").write_text("sequence\n" + "AAA\nAAB\n" * 200)
    changes = {"replay.offline_source": "file", "replay.offline_path": "known.csv", "replay.offline_share": 0.25}
    config = toy(**changes, **{"run.backend": "ray", "oracle.function": "tests.oracles:slow"})
    backend = RayBackend(config, CheckpointStore(in_tmp_path / "checkpoints"))
    prefill = backend._prefill

    def kill_and_prefill() -> None:
        ray.kill(backend._pool.slots[0].handle)
        prefill()

    backend._prefill = kill_and_prefill
    try:
        backend.start(None)
        assert backend._pool.slots[0].restarts == 1
        assert backend.statistics()["buffer_num_offline"] == 400
        steps(backend, 2)
    finally:
        backend.close()


def test_waiting_behind_another_call_is_not_taken_for_silence(in_tmp_path, toy):
    """Calls of 6 s, two queued at the actor, and 10 s of patience for each: none is overdue."""
    changes = {
        "run.backend": "ray",
        "actors.timeout_seconds": 10,
        "oracle.cache_size": 0,
        "oracle.function": "tests.oracles:very_slow",
    }
    backend = RayBackend(toy(**changes), CheckpointStore(in_tmp_path / "checkpoints"))
    try:
        backend.start(None)
        ray.get(backend._pool.slots[0].handle.ready.remote())
        steps(backend, 3)
        assert backend.accounting.num_restarts == 0
    finally:
        backend.close()


def test_offline_data_reach_the_buffer(in_tmp_path, toy):
    (in_tmp_path / "known.csv").write_text("sequence\n" + "AAA\nAAB\n" * 50)
    changes = {"replay.offline_source": "file", "replay.offline_path": "known.csv", "replay.offline_share": 0.25}
    config = toy(**changes, **{"run.backend": "ray"})
    assert train(config, None, None, None) == 0
    folder = RunFolder(config.run.output_folder / "toy")
    with np.load(folder.checkpoints.newest_first()[0] / "replay_buffer.npz") as saved:
        assert saved["offline_policy_version"].tolist() == [-1] * 100
