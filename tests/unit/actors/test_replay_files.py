"""Saved replay buffers: round trip, atomic writing, and files that cannot be used."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from actors.replay_buffer import ReplayBuffer, ReplayConfig, SavedBufferError
from actors.trajectories import TrajectoryBatch, empty_batch

SHARES = {"replay_share": 0.4, "offline_share": 0.2, "offline_source": "lower_half", "priority_exponent": 1.0}


def numbered(count: int, first: int = 0, num_steps: int = 3) -> TrajectoryBatch:
    """`count` trajectories that carry their number in every array but `num_steps`, which has a range."""
    batch = empty_batch(num_steps, count)
    for array in batch.arrays().values():
        array[:] = np.arange(first, first + count).reshape(-1, *[1] * (array.ndim - 1))
    batch.num_steps[:] = num_steps
    return batch


def make_buffer(capacity: int = 8, *, num_steps: int = 3, seed: int = 0, **settings) -> ReplayBuffer:
    return ReplayBuffer(ReplayConfig(capacity=capacity, **settings), num_steps, seed=seed)


def filled(num_added: int = 5, *, offline: int = 3, capacity: int = 8, **settings) -> ReplayBuffer:
    buffer = make_buffer(capacity, **settings)
    buffer.add(numbered(num_added), "actor 0", 4)
    buffer.add(numbered(num_added), "actor 0", 4)
    if offline:
        buffer.set_offline(numbered(offline, 100))
    return buffer


def contents(buffer: ReplayBuffer) -> tuple:
    """Everything that tells two buffers apart, the next random draws included (which it takes)."""
    draws = [buffer.draw(30, 30) for _ in range(2)]
    batches = [batch for draw in draws for batch in draw if batch is not None]
    drawn = [array.tolist() for batch in batches for array in batch.arrays().values()]
    return buffer.statistics(), buffer.num_added, drawn


def refused(path: Path, buffer: ReplayBuffer) -> str:
    with pytest.raises(SavedBufferError) as caught:
        buffer.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize("num_added", [1, 5, 8, 20])
@pytest.mark.parametrize("offline", [0, 3])
def test_a_saved_buffer_continues_the_same_random_draws(tmp_path, num_added, offline):
    buffer, path = filled(num_added, offline=offline, **SHARES), tmp_path / "buffer.npz"
    buffer.sample(10)
    buffer.save(path)
    other = filled(17, offline=2, seed=99, **SHARES)
    other.load(path)
    assert other.add(numbered(2, 50), "actor 0", 4) == buffer.add(numbered(2, 50), "actor 0", 4) == 0
    assert other.add(numbered(2, 50), "actor 0", 5) == buffer.add(numbered(2, 50), "actor 0", 5) == 2
    assert contents(other) == contents(buffer)


def test_an_empty_buffer_can_be_saved(tmp_path):
    make_buffer(seed=3).save(tmp_path / "b")
    other = filled()
    other.load(tmp_path / "b")
    assert (len(other), other.num_offline, other.num_duplicates) == (0, 0, 0)
    assert other.add(numbered(2), "actor 0", 0) == 2


def test_saving_changes_nothing_and_leaves_one_file(tmp_path):
    buffer, untouched = filled(**SHARES), filled(**SHARES)
    buffer.save(tmp_path / "b")
    buffer.save(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert contents(buffer) == contents(untouched)


@pytest.mark.parametrize("failing", ["numpy.savez", "os.fsync", "os.replace"])
def test_a_failing_write_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    path, buffer = tmp_path / "b", filled()
    buffer.save(path)
    before = path.read_bytes()
    buffer.add(numbered(3, 20), "actor 1", 0)

    def fail(file, *_args, **_arrays):
        if failing == "numpy.savez":
            file.write(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match="no space left"):
            buffer.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["b"]
    buffer.save(path)
    assert path.read_bytes() != before


def test_every_truncation_is_noticed(tmp_path):
    path, buffer = tmp_path / "b", make_buffer()
    filled().save(path)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert "damaged, cut short or not a saved replay buffer" in refused(path, buffer)
    path.write_bytes(whole)
    buffer.load(path)
    assert len(buffer) == 5


def test_no_flipped_bit_gives_another_error_or_other_contents(tmp_path):
    """A flip is either refused as a SavedBufferError, or hits a byte of the archive that means nothing."""
    path = tmp_path / "b"
    filled(3, offline=0, capacity=4).save(path)
    whole, expected = path.read_bytes(), contents(filled(3, offline=0, capacity=4))
    for place, bit in ((place, 1 << place % 8) for place in range(0, len(whole), 2)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        buffer = make_buffer(4)
        try:
            buffer.load(path)
        except SavedBufferError:
            continue
        assert contents(buffer) == expected, place


def test_a_missing_file_is_named(tmp_path):
    assert "No such file" in refused(tmp_path / "absent", make_buffer())
    refused(tmp_path, make_buffer())


def test_foreign_files_are_refused(tmp_path):
    buffer, path = make_buffer(), tmp_path / "b"
    path.write_bytes(b"sequence,score\nACG,1\n")
    refused(path, buffer)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    refused(path, buffer)
    with open(path, "wb") as file:
        np.savez(file, e_score=np.arange(4))
    assert "state" in refused(path, buffer)


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "b.npy", np.arange(3))
    assert refused(tmp_path / "b.npy", make_buffer())


def changed(path: Path, **changes) -> None:
    """Rewrite a saved buffer with other arrays (None: without), or other entries of its state."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    state = json.loads(str(arrays["state"]))
    for name, value in changes.items():
        target = state if name in state else arrays
        target[name] = value
    arrays["state"] = np.array(json.dumps(state))
    with open(path, "wb") as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def test_another_format_version_is_refused(tmp_path):
    filled().save(tmp_path / "b")
    changed(tmp_path / "b", format_version=1)
    assert "format version 1, this program reads version 3" in refused(tmp_path / "b", make_buffer())


def test_missing_or_uneven_arrays_are_refused(tmp_path):
    filled().save(tmp_path / "b")
    changed(tmp_path / "b", online_scores=np.zeros(4, np.float32))
    assert "does not fit" in refused(tmp_path / "b", make_buffer())
    filled().save(tmp_path / "b")
    changed(tmp_path / "b", offline_seed=None)
    assert "offline_seed" in refused(tmp_path / "b", make_buffer())


def test_pickled_arrays_are_never_loaded(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    filled().save(tmp_path / "b")
    changed(tmp_path / "b", online_seed=np.array([Trap()] * 5, dtype=object))
    refused(tmp_path / "b", make_buffer())
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("num_added", "capacity"), [(20, 16), (20, 7), (6, 4), (9, 9)])
def test_another_capacity_is_refused(tmp_path, num_added, capacity):
    filled(num_added).save(tmp_path / "b")
    message = refused(tmp_path / "b", make_buffer(capacity))
    assert "was saved with another replay.capacity or environment.length" in message


def test_another_length_of_sequences_is_refused(tmp_path):
    filled().save(tmp_path / "b")
    message = refused(tmp_path / "b", make_buffer(num_steps=4))
    assert "was saved with another replay.capacity or environment.length" in message


def test_a_refused_file_leaves_the_buffer_as_it_was(tmp_path):
    filled(20, capacity=16, seed=5).save(tmp_path / "b")
    buffer, untouched = filled(**SHARES), filled(**SHARES)
    refused(tmp_path / "b", buffer)
    refused(tmp_path / "absent", buffer)
    assert contents(buffer) == contents(untouched)
