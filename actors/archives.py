"""Arrays and plain values in one npz file, without pickled objects: written whole or not at all, damage noticed."""

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from learner.checkpoint import check_archive

DAMAGE = (
    OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, AssertionError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What reading a damaged archive may raise."""


def write_archive(path: Path, state: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write `state`, which JSON can hold, and `arrays` (none is called `state`) so that `path` is whole or absent."""
    contents: dict[str, Any] = {"state": np.array(json.dumps(state)), **arrays}
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_archive(path: Path, max_bytes: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """State and arrays that `write_archive` wrote, of at most `max_bytes`; raises one of `DAMAGE` for anything else."""
    check_archive(path, max_bytes)
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("state"))), arrays
