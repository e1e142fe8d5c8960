"""Checkpoints of a run: a folder a step, complete or absent, the newest few kept."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from distributed.config import ConfigError, ExperimentConfig, validate
from learner.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from learner.gflownet import EvaluationWeights, GFlowNetLearner

LEARNER_FILE, BUFFER_FILE, STATE_FILE = "learner.pt", "replay_buffer.npz", "state.json"
NUM_KEPT = 2


class CheckpointStore:
    """The folder `checkpoints` of a run."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()  # actors have working directories of their own

    def write(self, step: int, write_files: Callable[[Path], dict[str, Any]]) -> Path:
        """Make the checkpoint of `step`: `write_files(folder)` writes into it and returns the state to put beside.

        The folder appears under its name only when all is on disk. Raises OSError, leaving older ones as they were.
        """
        final, temporary = self.folder / f"step_{step:09d}", self.folder / f".step_{step:09d}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            state = write_files(temporary)
            with open(temporary / STATE_FILE, "w") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self.newest_first()[NUM_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def set_aside_newer(self, checkpoint: Path) -> None:
        """Rename those that are newer than `checkpoint`, which a resumed run passed over, to damaged_…"""
        for newer in self.newest_first():
            if newer.name > checkpoint.name:
                aside = newer.with_name(f"damaged_{newer.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(newer, aside)

    def newest_first(self) -> list[Path]:
        """Folders of complete checkpoints."""
        return sorted(self.folder.glob("step_*"), reverse=True)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `write` put beside learner and buffer; raises CheckpointError."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE}: missing or damaged ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{checkpoint / STATE_FILE}: not a mapping")
    return state


def save_learner(learner: GFlowNetLearner, config: ExperimentConfig, folder: Path) -> None:
    """Write the learner and its configuration into `folder`."""
    save_checkpoint(folder / LEARNER_FILE, {"learner": learner.state_dict(), "config": config.to_yaml()})


def restore_learner(learner: GFlowNetLearner, folder: Path) -> None:
    """Continue from the learner saved in `folder`; raises CheckpointError if it does not fit."""
    try:
        learner.load_state_dict(load_checkpoint(folder / LEARNER_FILE)["learner"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / LEARNER_FILE}: does not fit this configuration ({error})") from error


def load_sampler(path: Path) -> tuple[ExperimentConfig, EvaluationWeights]:
    """Configuration and weights from a run folder, a checkpoint folder or a learner file.

    Of a run folder, the newest readable checkpoint. Raises CheckpointError.
    """
    if path.is_file():
        return _read_sampler(path)
    if (path / LEARNER_FILE).is_file():
        return _read_sampler(path / LEARNER_FILE)
    candidates = CheckpointStore(path / "checkpoints").newest_first()
    if not candidates:
        raise CheckpointError(f"{path}: neither a run folder with a checkpoint nor a checkpoint")
    faults = []
    for candidate in candidates:
        try:
            return _read_sampler(candidate / LEARNER_FILE)
        except CheckpointError as error:
            faults.append(str(error))
    raise CheckpointError("; ".join(faults))


def _read_sampler(file: Path) -> tuple[ExperimentConfig, EvaluationWeights]:
    saved = load_checkpoint(file)
    try:
        config = validate(yaml.safe_load(saved["config"]))
        state = saved["learner"]
        weights = EvaluationWeights(int(state["step"]), state["averaged"].numpy(), state["dynamics"].numpy())
    except (KeyError, TypeError, AttributeError, ConfigError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file}: its content is not that of a checkpoint ({error})") from error
    return config, weights
