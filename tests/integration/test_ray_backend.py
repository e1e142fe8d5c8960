"""The Ray backend inside this process, on one shared Ray runtime."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import ActorUnavailableError

from distributed import ray_backend
from distributed.backend import RunFailed
from distributed.checkpoints import CheckpointStore, load_sampler
from distributed.ray_actors import LearnerActor
from distributed.ray_backend import RayBackend
from distributed.ray_calls import Pending
from distributed.ray_gauges import GAUGES
from distributed.ray_replay import ReplayBufferActor
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


def test_the_buffers_process_has_not_loaded_pytorch(backend):
    """It would hold three times as much memory, and be ready two seconds later."""
    backend.start(None)
    steps(backend, 2)
    pid, _ = ray.get(backend._buffer.handle.ready.remote())
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


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
    seeds = backend.seeds()
    rollouts = {"rollout-0.0", "rollout-1.0", "rollout-0.1", "rollout-1.1"}
    assert set(seeds) == {"learner", "replay"} | rollouts
    assert len(set(seeds.values())) == len(seeds)
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


def test_an_actor_that_cannot_be_reached_is_left_alone_for_a_while(backend):
    """Its connection broke: it may answer again, or be found dead; nothing is counted as a restart."""
    backend.start(None)
    steps(backend, 2)
    slot = backend._pool.slots[0]
    call = Pending("rollout", slot, slot.handle)
    backend._pool.failed(call, ActorUnavailableError("the connection broke", None))
    assert slot.retry_at > time.monotonic()
    while slot.silent_since is not None:
        backend.step()
    steps(backend, 2)
    assert (slot.restarts, backend.accounting.num_restarts) == (0, 0)
    slot.silent_since = time.monotonic() - backend.config.actors.timeout_seconds
    backend._pool.failed(call, ActorUnavailableError("the connection broke", None))
    assert (slot.restarts, slot.silent_since, backend.accounting.num_restarts) == (1, None, 1)
    steps(backend, 5)


def test_an_actor_in_whose_place_none_can_work_is_done_without(in_tmp_path, toy, oracle_folder, caplog):
    """The oracle hangs in one of two actors, and there only."""
    changes = {
        "oracle.function": "tests.oracles:hangs_in_one_actor", "oracle.timeout_seconds": 0.5, "oracle.max_retries": 0,
        "oracle.max_consecutive_failures": 3, "evaluation.exact": "never", "actors.num_rollout_actors": 2,
    }  # fmt: skip
    backend = RayBackend(toy(**changes, **{"run.backend": "ray"}), CheckpointStore(in_tmp_path / "checkpoints"))
    try:
        backend.start(None)
        while len(backend._pool.slots) == 2:
            backend.step()
            assert backend.accounting.balanced
        assert "failed 3 times in a row; last: no answer within 0.5 s; the place of rollout actor" in caplog.text
        steps(backend, 5)
        assert backend.accounting.num_restarts == 0
        backend.drain()
        assert backend.accounting.num_in_flight == 0
    finally:
        backend.close()


def test_one_slow_answer_does_not_idle_an_actor(in_tmp_path, toy, oracle_folder):
    changes = {"oracle.function": "tests.oracles:one_slow_answer", "oracle.num_processes": 2, "actors.batch_size": 8}
    backend = RayBackend(toy(**changes, **{"run.backend": "ray"}), CheckpointStore(in_tmp_path / "checkpoints"))
    try:
        backend.start(None)
        steps(backend, 10)
        sampled = backend.accounting.num_sampled
        assert (oracle_folder / "asked").exists()
        (oracle_folder / "go").touch()
        steps(backend, 10)
        assert backend.accounting.num_sampled > sampled
        assert backend.accounting.num_restarts == 0
    finally:
        backend.close()


class SlowLearnerActor(LearnerActor):
    @ray.method(num_returns=2)
    def update(self, draw, *fresh):
        time.sleep(0.2)
        return super().update(draw, *fresh)


class SlowReplayBufferActor(ReplayBufferActor):
    @ray.method(concurrency_group="write")
    def add(self, batch, source, number):
        time.sleep(0.2)
        return super().add(batch, source, number)


@pytest.mark.parametrize("slow", ["learner", "buffer", "oracle"])
def test_queues_and_lag_stay_short_whatever_is_slow(in_tmp_path, toy, monkeypatch, slow):
    changes = {"actors.num_rollout_actors": 3, "actors.num_cpus": 0.1, "oracle.cache_size": 0}
    if slow == "learner":
        monkeypatch.setattr(ray_backend, "RemoteLearnerActor", ray.remote(max_restarts=0)(SlowLearnerActor))
    elif slow == "buffer":
        groups = {"write": 1, "read": 1}
        remote = ray.remote(max_restarts=0, num_cpus=0, concurrency_groups=groups)(SlowReplayBufferActor)
        monkeypatch.setattr(ray_backend, "RemoteReplayBufferActor", remote)
    else:
        changes["oracle.function"] = "tests.oracles:slow"
    config = toy(**changes, **{"run.backend": "ray"})
    backend = RayBackend(config, CheckpointStore(in_tmp_path / "checkpoints"))
    calls = 3 * config.actors.max_in_flight
    seen = Counter()
    try:
        backend.start(None)
        for _ in range(25):
            result = backend.step()
            assert backend.accounting.balanced
            assert len(backend._calls) <= calls + 2 + ray_backend.MAX_ADDS_IN_FLIGHT + calls
            if result is not None:
                seen |= Counter({name: int(value) for name, value in result.metrics.items() if name.startswith("num_")})
        lags = backend.accounting.take_lags()
    finally:
        backend.close()
    assert seen["num_rollout_calls"] <= calls
    assert seen["num_waiting_batches"] <= calls + 1
    assert seen["num_waiting_adds"] <= ray_backend.MAX_ADDS_IN_FLIGHT + calls
    assert lags["policy_lag_min"] <= lags["policy_lag"] <= lags["policy_lag_max"] <= config.actors.policy_lag_limit(3)
    assert backend.accounting.num_stale == 0
    if slow == "learner":  # what waits there counts in the lag
        assert seen["num_waiting_batches"] >= 3
        assert lags["policy_lag_max"] >= 3
    if slow == "buffer":
        assert seen["num_waiting_adds"] >= ray_backend.MAX_ADDS_IN_FLIGHT


def test_small_batches_that_wait_are_trained_on_together(in_tmp_path, toy, monkeypatch):
    """Batches of 8 and a learner's batch of 32: a learner that lags behind takes four at a time."""
    monkeypatch.setattr(ray_backend, "RemoteLearnerActor", ray.remote(max_restarts=0)(SlowLearnerActor))
    changes = {"actors.batch_size": 8, "learner.batch_size": 32, "actors.max_in_flight": 8}
    backend = RayBackend(toy(**changes, **{"run.backend": "ray"}), CheckpointStore(in_tmp_path / "checkpoints"))
    try:
        backend.start(None)
        trained = []
        for _ in range(6):
            before = backend.accounting.num_trained
            steps(backend, 1)
            trained.append(backend.accounting.num_trained - before)
        assert set(trained) <= {8, 16, 24, 32}
        assert trained[-1] == 32
        assert len(backend.accounting.lags) == sum(trained) // 8
    finally:
        backend.close()


def test_weights_may_be_broadcast_less_often(in_tmp_path, toy):
    config = toy(**{"run.backend": "ray", "actors.broadcast_every": 5})
    backend = RayBackend(config, CheckpointStore(in_tmp_path / "checkpoints"))
    try:
        backend.start(None)
        steps(backend, 12)
        assert backend._pool.version == backend.accounting.policy_version // 5 * 5 >= 10
        assert backend.accounting.take_lags()["policy_lag_max"] >= 4
    finally:
        backend.close()


def exported() -> dict[str, float]:
    """What this node's agent shows Prometheus of the run `gauged`."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    lines = [line for line in text.splitlines() if line.startswith("ray_sequence_flows_") and 'run="gauged"' in line]
    return {line.split("{")[0].removeprefix("ray_sequence_flows_"): float(line.split()[-1]) for line in lines}


def test_the_state_of_a_run_is_exported_as_ray_metrics(in_tmp_path, toy):
    config = toy(**{"run.backend": "ray", "run.name": "gauged", "actors.num_rollout_actors": 2})
    backend = RayBackend(config, CheckpointStore(in_tmp_path / "checkpoints"))
    try:
        backend.start(None)
        deadline = time.monotonic() + 60
        while set(exported()) != set(GAUGES) or not exported()["trajectories_per_second"]:
            assert time.monotonic() < deadline, exported()
            steps(backend, 2)
        assert exported()["num_rollout_actors"] == 2
        assert 0 < exported()["learner_utilisation"] <= 1
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
        steps(backend, 2)
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
