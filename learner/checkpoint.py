"""Reading and writing of learner checkpoints: plain tensors and numbers, no pickled objects."""

import io
from pathlib import Path
from typing import Any

import torch

from learner.archives import check_archive, write_whole

FORMAT_VERSION = 2
MAX_CHECKPOINT_BYTES = 16 << 30
"""Size of a learner's file; one of a billion parameters is smaller."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (nested dicts and lists of tensors, numbers and strings) so that `path` is whole or absent.

    Raises OSError if it cannot be written.
    """
    content = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state}, content)  # into a file, a full disk would be a RuntimeError
    write_whole(path, lambda file: file.write(content.getbuffer()))


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
