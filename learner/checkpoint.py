"""Reading and writing of learner checkpoints: plain tensors and numbers, no pickled objects."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1
MAX_CHECKPOINT_BYTES = 16 << 30
"""Size of a learner's file; one of a billion parameters is smaller."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


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


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (nested dicts and lists of tensors, numbers and strings) so that `path` is whole or absent.

    Raises OSError if it cannot be written.
    """
    temporary, content = path.with_name(path.name + ".part"), io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state}, content)  # into a file, a full disk would be a RuntimeError
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state written by `save_checkpoint`, on the CPU.

    Raises CheckpointError if the file is missing, damaged, unsafe, too large, or of another format version.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        check_archive(path, MAX_CHECKPOINT_BYTES)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged or unsafe files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged, cut short or not a checkpoint ({reason})") from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}, this program reads version {FORMAT_VERSION}")
    return state
