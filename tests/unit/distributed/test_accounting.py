"""Counters, seeds, checkpoints and the run folder."""

import json
import resource
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed.backend import Accounting
from distributed.checkpoints import NUM_KEPT, CheckpointStore, load_sampler, load_state
from distributed.config import ConfigError
from distributed.experiment import derive_seed
from distributed.run_folder import RunFolder, default_name
from learner.checkpoint import CheckpointError


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(0, 5000))
def test_a_restored_buffer_keeps_the_books_balanced(batches, restored):
    accounting = Accounting()
    for count in batches:
        accounting.num_sampled += count
        accounting.num_stored += count
    accounting.set_stored(min(restored, accounting.num_stored))
    assert accounting.balanced
    again = Accounting()
    again.load_state_dict(json.loads(json.dumps(accounting.state_dict())))
    assert again.balanced
    assert again.counts() == accounting.counts()


def test_what_is_in_flight_at_a_save_counts_as_lost_after_a_resume():
    accounting = Accounting(num_sampled=10, num_stored=7, num_in_flight=3)
    resumed = Accounting()
    resumed.load_state_dict(accounting.state_dict())
    assert (resumed.num_lost, resumed.num_in_flight, resumed.balanced) == (3, 0, True)


def test_lags_are_summarised_once():
    accounting = Accounting(lags=[1, 2, 6])
    assert accounting.take_lags() == {"policy_lag_min": 1, "policy_lag": 3.0, "policy_lag_max": 6}
    assert accounting.take_lags() == {}


def test_seeds_differ_between_roles_actors_restarts_and_runs():
    seeds = {
        derive_seed(seed, role, index, incarnation)
        for seed in (0, 1)
        for role in ("learner", "rollout", "replay")
        for index in range(20)
        for incarnation in range(5)
    }
    assert len(seeds) == 2 * 3 * 20 * 5
    assert derive_seed(1, "rollout", 2, 3) == derive_seed(1, "rollout", 2, 3)


def test_checkpoints_appear_whole_and_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in range(4):
        backend = {"accounting": Accounting().state_dict()}
        state = {"step": step, "wall_seconds": 0.0, "run_key": "k", "backend": backend}
        store.write(step, lambda folder, state=state: state)
    kept = store.newest_first()
    assert [load_state(path)["step"] for path in kept] == [3, 2]
    assert len(kept) == NUM_KEPT


def test_a_failed_write_leaves_the_older_checkpoints(tmp_path):
    store = CheckpointStore(tmp_path)
    store.write(1, lambda folder: {"step": 1})

    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.write(2, fail)
    assert [path.name for path in store.folder.iterdir()] == ["step_000000001"]


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_state_is_a_checkpoint_error(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load_state(tmp_path)


def test_a_path_that_holds_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run folder"):
        load_sampler(tmp_path)


def test_a_checkpoint_with_foreign_content(tmp_path):
    from learner.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "learner.pt", {"config": "run: {}", "learner": 3})
    with pytest.raises(CheckpointError, match="not that of a checkpoint"):
        load_sampler(tmp_path)


def test_metrics_survive_a_line_cut_short(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append_metrics({"step": step})
    with open(folder.metrics_file, "a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in folder.read_metrics()] == [1, 2, 3]
    folder.forget_metrics_after(2)
    folder.append_metrics({"step": 3})
    assert [record["step"] for record in folder.read_metrics()] == [1, 2, 3]


def test_a_full_disk_cuts_no_line_short(tmp_path):
    """The disk is full after 40 bytes, then there is room again."""
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "loss": 0.5})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
        with pytest.raises(OSError, match=r"No space left|File too large"):
            folder.append_metrics({"step": 2, "loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    folder.append_metrics({"step": 3, "loss": 0.125})
    assert folder.metrics_file.read_text().splitlines() == ['{"step": 1, "loss": 0.5}', '{"step": 3, "loss": 0.125}']


def test_run_folders_that_cannot_be_made(tmp_path, toy):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        RunFolder.create(toy(**{"run.output_folder": str(tmp_path / "file")}))


def test_names_made_from_a_file_are_valid(tmp_path):
    name = default_name(tmp_path / "my conf?.yaml")
    assert name.startswith("my-conf-")
    assert all(c.isalnum() or c in "._-" for c in name)
