"""Files that are written whole or not at all, and npz archives of arrays and plain values, without pickled objects."""

import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

DAMAGE = (
    OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, AssertionError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What reading a damaged archive may raise."""


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Have `write(file)` fill the file, so that `path` is whole and on disk, or as before; raises OSError if it cannot be."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_archive(path: Path, limit: int) -> None:
    """Raises ValueError for a ZIP archive of more than `limit` bytes, and for one that would unpack to more than it holds.

    Torch and NumPy store what they save as it is, so no archive of theirs is compressed, and none has entries that overlap.
    """
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{size:,} bytes; allowed: up to {limit:,}")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("a compressed archive; allowed: one that is stored as it is")
    if sum(member.file_size for member in members) > size:
        raise ValueError(f"an archive of {size:,} bytes whose entries claim more")


def write_archive(path: Path, state: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write `state`, which JSON can hold, and `arrays` (none is called `state`) so that `path` is whole or absent."""
    contents: dict[str, Any] = {"state": np.array(json.dumps(state)), **arrays}
    write_whole(path, lambda file: np.savez(file, **contents))


def read_archive(path: Path, max_bytes: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """State and arrays that `write_archive` wrote, of at most `max_bytes`; raises one of `DAMAGE` for anything else."""
    check_archive(path, max_bytes)
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("state"))), arrays
