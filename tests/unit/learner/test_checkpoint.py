"""Checkpoints: whole or absent, and nothing in them is ever executed."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from learner import archives
from learner.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

STATE = {"step": 3, "policy": torch.arange(1000.0), "nested": {"list": [1, torch.ones(2)], "name": "x", "rate": 0.5}}


class Malicious:
    """Makes a directory when it is unpickled by a trusting reader."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "learner.pt"


def test_round_trip(path: Path):
    save_checkpoint(path, STATE)
    state = load_checkpoint(path)
    assert state["step"] == 3
    assert torch.equal(state["policy"], STATE["policy"])
    assert (state["nested"]["name"], state["nested"]["rate"]) == ("x", 0.5)
    assert torch.equal(state["nested"]["list"][1], torch.ones(2))
    assert os.listdir(path.parent) == [path.name]


def test_a_missing_file_and_a_folder(path: Path):
    for wrong in (path, path.parent):
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            load_checkpoint(wrong)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file(path: Path, share: float):
    save_checkpoint(path, STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"learner\.pt: damaged, cut short"):
        load_checkpoint(path)


def test_a_file_of_something_else(path: Path):
    path.write_text("step: 3\n")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [{"format_version": 1, "step": 1}, {"step": 1}, [1, 2], torch.ones(3)], ids=str)
def test_another_format_version(path: Path, content: Any):
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="this program reads version 2"):
        load_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_unexecuted(path: Path, zipped: bool):
    marker = path.parent / "executed"
    content = {"format_version": 2, "step": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the attack itself works
    assert marker.exists()


def fail(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(path: Path, call: str, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(path, {"step": 1})
    monkeypatch.setattr(archives.os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(path.parent) == [path.name]


def test_a_state_that_cannot_be_written_leaves_the_old_file(path: Path):
    save_checkpoint(path, {"step": 1})
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_checkpoint(path, {"step": 2, "policy": torch.ones(10), "broken": (i for i in range(3))})
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(path.parent) == [path.name]


def test_a_failing_first_write_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archives.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, STATE)
    assert os.listdir(path.parent) == []
