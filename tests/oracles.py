"""Oracle functions that tests give by name."""

import contextlib
import os
import time
from pathlib import Path


def count_b(sequences: list[str]) -> list[float]:
    """(1 + number of B) / 5."""
    return [(1 + s.count("B")) / 5 for s in sequences]


def nan_for_aaa(sequences: list[str]) -> list[float]:
    """No score for AAA."""
    return [float("nan") if s == "AAA" else 0.5 for s in sequences]


def share_of_c(sequences: list[str]) -> list[float]:
    """Share of C."""
    return [s.count("C") / len(s) for s in sequences]


def nan_for_aaaa(sequences: list[str]) -> list[float]:
    """No score for AAAA, else the share of C."""
    return [float("nan") if s == "AAAA" else s.count("C") / len(s) for s in sequences]


def always_nan(sequences: list[str]) -> list[float]:
    """No score at all."""
    return [float("nan")] * len(sequences)


def always_raises(sequences: list[str]) -> list[float]:
    """A broken oracle."""
    raise RuntimeError("the assay is on fire")


def hangs_once(sequences: list[str]) -> list[float]:
    """Hangs in the first call of all, as told by a file."""
    marker = Path(os.environ["HANG_MARKER"])
    if not marker.exists():
        marker.touch()
        time.sleep(600)
    return count_b(sequences)


def slow(sequences: list[str]) -> list[float]:
    """20 ms a call, as a remote service may take."""
    time.sleep(0.02)
    return count_b(sequences)


def slow_while_told(sequences: list[str]) -> list[float]:
    """100 ms a call, as long as a file is there."""
    time.sleep(0.1 * Path(os.environ["SLOW_MARKER"]).exists())
    return count_b(sequences)


def fifty_milliseconds(sequences: list[str]) -> list[float]:
    """50 ms a call."""
    time.sleep(0.05)
    return [1.0] * len(sequences)


def quarter_second(sequences: list[str]) -> list[float]:
    """250 ms a call."""
    time.sleep(0.25)
    return [1.0] * len(sequences)


def negative_for_aaa(sequences: list[str]) -> list[float]:
    """A score that is rejected."""
    return [-1.0 if s == "AAA" else 0.5 for s in sequences]


def very_slow(sequences: list[str]) -> list[float]:
    """6 s a call."""
    time.sleep(6)
    return count_b(sequences)


def one_slow_answer(sequences: list[str]) -> list[float]:
    """The first call of all waits until the file GO is there; the others are answered at once."""
    folder = Path(os.environ["ORACLE_FOLDER"])
    with contextlib.suppress(FileExistsError):
        (folder / "asked").touch(exist_ok=False)
        while not (folder / "go").exists():
            time.sleep(0.05)
    return count_b(sequences)


def hangs_in_one_actor(sequences: list[str]) -> list[float]:
    """Hangs in whatever actor asks first, as told by a file, and only there: as if something were wrong with its node."""
    file = Path(os.environ["ORACLE_FOLDER"]) / "bad_actor"
    with contextlib.suppress(FileExistsError), open(file, "x") as bad:
        bad.write(str(os.getppid()))
    if file.read_text() == str(os.getppid()):
        time.sleep(600)
    return count_b(sequences)


def hangs_on_worker1(sequences: list[str]) -> list[float]:
    """Hangs on one host of the lab."""
    if os.uname().nodename == "worker1":
        time.sleep(600)
    return quarter_second(sequences)
