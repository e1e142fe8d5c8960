"""What tests of hostile input share."""

import os
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MAX_SECONDS, MAX_GROWTH = 5.0, 400 << 20


@pytest.fixture
def frugal() -> Iterator[None]:
    """Every test is over soon, and leaves the process about as large as it was."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - start < MAX_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_GROWTH


class Trap:
    """What a trusting reader of pickles or tags would run."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def npy(shape: str, dtype: str = "'<f8'", rows: bytes = bytes(48)) -> bytes:
    """A .npy file whose header claims a shape."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + rows


def bomb(levels: int) -> str:
    """Ten aliases of the level before on each: 10^levels values."""
    lines = ["network:", "  name: &l0 [x, x]"]
    lines += [f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"  kmer_sizes: *l{levels - 1}"])
