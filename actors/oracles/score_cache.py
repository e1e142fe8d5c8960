"""Scores that an oracle has given before: in memory, and in a file that all processes of a node share."""

import logging
import sqlite3
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)
BUSY_SECONDS = 5.0
"""How long to wait for another process that writes to the file."""
MAX_VARIABLES = 500
"""Sequences asked for in one query."""


class ScoreCache:
    """The `size` last used scores in memory, and all in the sqlite file `path`, if one is given; safe for threads.

    A file that cannot be used (damaged, locked, full disk) costs a warning and is then done without.
    """

    def __init__(self, size: int, path: Path | None = None):
        self._size, self._path, self._lock = size, path, threading.Lock()
        self._memory: OrderedDict[bytes, float] = OrderedDict()
        self._file: sqlite3.Connection | None = None
        if path is not None:
            try:
                self._file = _open(path)
            except (OSError, sqlite3.Error) as error:
                self._give_up(error)

    def get(self, sequences: np.ndarray) -> np.ndarray:
        """Scores float64 [n] of distinct `sequences` bytes [n]; NaN where none is known."""
        asked = sequences.tolist()
        with self._lock:
            scores = [self._memory.get(sequence, np.nan) for sequence in asked]
            for sequence in asked:
                if sequence in self._memory:
                    self._memory.move_to_end(sequence)
            missing = [sequence for sequence, score in zip(asked, scores, strict=True) if score != score]
            if self._file is None or not missing:
                return np.array(scores, np.float64)
            found = self._from_file(missing)
            self._remember(found)
        return np.array([found.get(sequence, score) for sequence, score in zip(asked, scores, strict=True)], np.float64)

    def put(self, sequences: np.ndarray, scores: np.ndarray) -> None:
        """Remember `scores` float64 [n] of `sequences` bytes [n], less those that are NaN."""
        known = ~np.isnan(scores)
        found = dict(zip(sequences[known].tolist(), scores[known].tolist(), strict=True))
        with self._lock:
            self._remember(found)
            if self._file is not None and found:
                try:
                    with self._file:
                        self._file.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", found.items())
                except sqlite3.Error as error:
                    self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._close_file()

    def _from_file(self, sequences: list[bytes]) -> dict[bytes, float]:
        found: dict[bytes, float] = {}
        try:
            for start in range(0, len(sequences), MAX_VARIABLES):
                part = sequences[start : start + MAX_VARIABLES]
                marks = ",".join("?" * len(part))
                query = f"SELECT sequence, score FROM scores WHERE sequence IN ({marks})"  # noqa: S608 - only question marks
                assert self._file is not None
                rows = self._file.execute(query, part)
                found |= {sequence: score for sequence, score in rows if isinstance(score, float)}
        except sqlite3.Error as error:
            self._give_up(error)
        return found

    def _remember(self, found: dict[bytes, float]) -> None:
        for sequence, score in found.items():
            self._memory[sequence] = score
            self._memory.move_to_end(sequence)
        while len(self._memory) > self._size:
            self._memory.popitem(last=False)

    def _give_up(self, error: Exception) -> None:
        logger.warning("scores are not shared through %s: %s", self._path, error)
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    file.execute("PRAGMA journal_mode=WAL")
    file.execute("PRAGMA synchronous=OFF")  # after a crash of the machine a score is computed again
    file.execute("CREATE TABLE IF NOT EXISTS scores (sequence BLOB PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID")
    return file
