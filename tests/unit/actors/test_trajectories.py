"""Trajectory batches: shapes, slicing, joining and mixing."""

from dataclasses import fields

import numpy as np
import pytest

from actors.trajectories import TrajectoryBatch, concatenate, empty_batch, mix


def numbered(count: int, first: int = 0, num_steps: int = 3) -> TrajectoryBatch:
    """`count` trajectories that carry their number in every array."""
    numbers = np.arange(first, first + count)
    batch = empty_batch(num_steps, count)
    for array in batch.arrays().values():
        array[:] = numbers[:, None] if array.ndim == 2 else numbers
    return batch


def same(left: TrajectoryBatch, right: TrajectoryBatch) -> bool:
    return all(np.array_equal(a, right.arrays()[name]) for name, a in left.arrays().items())


def test_empty_batch_has_the_documented_shapes_and_types():
    shown = {name: (a.shape, a.dtype.name) for name, a in empty_batch(5, 2).arrays().items()}
    assert shown == {
        "tokens": ((2, 5), "int16"),
        "actions": ((2, 5), "int16"),
        "num_steps": ((2,), "int16"),
        "scores": ((2,), "float32"),
        "log_behaviour": ((2, 5), "float32"),
        "policy_version": ((2,), "int64"),
        "seed": ((2,), "int64"),
        "contexts": ((2,), "int32"),
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (slice(2, 4), [2, 3]),
        (np.array([4, 0, 4]), [4, 0, 4]),
        (np.array([True, False, False, True, False]), [0, 3]),
        (slice(5, None), []),
    ],
)
def test_rows_are_taken_from_every_array(rows, expected):
    taken = numbered(5)[rows]
    assert len(taken) == len(expected)
    for name, array in taken.arrays().items():
        first_column = array[:, 0] if array.ndim == 2 else array
        assert first_column.tolist() == expected, name


@pytest.mark.parametrize("name", [field.name for field in fields(TrajectoryBatch) if field.name != "scores"])
def test_arrays_of_different_length_are_refused_by_name(name):
    arrays = numbered(3).arrays()
    arrays[name] = arrays[name][:2]
    with pytest.raises(AssertionError, match=f"{name} does not fit 3 rows"):
        TrajectoryBatch(**arrays)


def test_concatenate_keeps_the_order():
    assert same(concatenate([numbered(2), numbered(0), numbered(3, 2), numbered(1, 5)]), numbered(6))


def test_concatenate_of_one_batch_copies_nothing():
    batch = numbered(2)
    assert concatenate([batch]) is batch
    assert mix([batch]) is batch


def test_mix_keeps_every_trajectory_once_and_its_arrays_together():
    mixed = mix([numbered(7), numbered(3, 7), numbered(0), numbered(12, 10)])
    assert sorted(mixed.seed) == list(range(22))
    assert same(mixed, numbered(22)[mixed.seed])


@pytest.mark.parametrize("size", [30, 60, 90, 150])
def test_slices_of_a_mix_keep_the_shares(size):
    mixed = mix([numbered(200), numbered(100, 200)])
    for start in range(0, 300 - size, 15):
        share = (mixed.seed[start : start + size] >= 200).mean()
        assert share == pytest.approx(1 / 3, abs=2 / size)
