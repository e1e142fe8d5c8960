"""Scores in memory and in the file that the processes of a node share."""

import multiprocessing
import sqlite3

import numpy as np
import pytest

from actors.oracles import score_cache
from actors.oracles.score_cache import ScoreCache


def names(*numbers: int) -> np.ndarray:
    return np.array([f"S{number}".encode() for number in numbers])


def test_the_file_gives_what_memory_has_forgotten(tmp_path):
    cache = ScoreCache(2, tmp_path / "a" / "scores.sqlite")
    cache.put(names(0, 1, 2), np.array([0.0, np.nan, 2.0]))
    cache.put(names(3, 4), np.array([3.0, 4.0]))
    np.testing.assert_array_equal(cache.get(names(0, 1, 2, 3, 4, 5)), [0, np.nan, 2, 3, 4, np.nan])
    cache.close()
    again = ScoreCache(0, tmp_path / "a" / "scores.sqlite")
    np.testing.assert_array_equal(again.get(names(4, 1)), [4, np.nan])
    again.close()


def test_without_a_file_only_the_last_used_are_known():
    cache = ScoreCache(2)
    cache.put(names(0, 1), np.array([0.0, 1.0]))
    cache.get(names(0))
    cache.put(names(2), np.array([2.0]))
    np.testing.assert_array_equal(cache.get(names(0, 1, 2)), [0, np.nan, 2])


def test_more_sequences_than_one_query_holds(tmp_path):
    many = names(*range(3 * score_cache.MAX_VARIABLES + 1))
    with_file = ScoreCache(0, tmp_path / "scores.sqlite")
    with_file.put(many, np.arange(len(many), dtype=float))
    np.testing.assert_array_equal(with_file.get(many[::-1]), np.arange(len(many))[::-1])
    with_file.close()


def _write(path, first):
    cache = ScoreCache(10, path)
    for start in range(first, first + 2000, 100):
        cache.put(names(*range(start, start + 100)), np.arange(start, start + 100, dtype=float))
    cache.close()


def test_processes_write_to_one_file_at_the_same_time(tmp_path):
    path = tmp_path / "scores.sqlite"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, 1000 * number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    reader = ScoreCache(0, path)
    np.testing.assert_array_equal(reader.get(names(*range(4000))), np.arange(4000))
    reader.close()


@pytest.mark.parametrize("damage", ["no database", "a folder", "another table"])
def test_a_file_that_cannot_be_used_is_done_without(tmp_path, caplog, damage):
    path = tmp_path / "scores.sqlite"
    if damage == "a folder":
        path.mkdir()
    elif damage == "another table":
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE scores (number INTEGER)")
    else:
        path.write_bytes(b"these are no scores" * 100)
    cache = ScoreCache(10, path)
    cache.put(names(1), np.array([1.0]))
    np.testing.assert_array_equal(cache.get(names(1, 2)), [1, np.nan])
    cache.close()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"scores are not shared through {path}: ")


def test_a_file_that_is_damaged_meanwhile_is_done_without(tmp_path, caplog):
    path = tmp_path / "scores.sqlite"
    cache = ScoreCache(10, path)
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE scores")
    other.close()
    cache.put(names(1), np.array([1.0]))
    assert "no such table" in caplog.messages[0]
    assert cache.get(names(1)).tolist() == [1]
    cache.close()
