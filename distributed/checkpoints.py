"""Checkpoints of a run: a folder a step, complete or absent, the newest few kept."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed.backend import Accounting
from distributed.config import ConfigError, ExperimentConfig, validate
from distributed.config_keys import shortened
from distributed.exported import DESCRIPTION_FILE, check_weights, read_export
from distributed.yaml_text import parse_yaml, read_limited
from learner.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from learner.drakes.learner import DrakesLearner
from learner.gflownet import EvaluationWeights, GFlowNetLearner, check_step

LEARNER_FILE, BUFFER_FILE, STATE_FILE = "learner.pt", "replay_buffer.npz", "state.json"
NUM_KEPT = 2
MAX_STATE_BYTES = 1_000_000
SERIES_SOURCE = {"dataset", "path", "time_column", "resample", "impute", "stride", "train_share", "validation_share"}
"""Keys of the section data that say where rows come from, not what a window and a token are."""


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
        state = json.loads(read_limited(checkpoint / STATE_FILE, MAX_STATE_BYTES))
        if not isinstance(state, dict):
            raise ValueError("not a mapping")
        check_step(state["step"])
        if not 0 <= state["wall_seconds"] < 2**53:
            raise ValueError("wall_seconds: allowed are finite numbers >= 0")
        Accounting().load_state_dict(state["backend"]["accounting"])
        if not re.fullmatch(r"[A-Za-z0-9_/-]{1,200}", state["run_key"]):
            raise ValueError(f"run_key: got {shortened(repr(state['run_key']))}; allowed: letters, digits, _, / and -")
    except KeyError as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE}: damaged (has no {error})") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE}: missing or damaged ({error})") from error
    return state


def save_learner(learner: GFlowNetLearner | DrakesLearner, config: ExperimentConfig, folder: Path) -> None:
    """Write the learner and its configuration into `folder`."""
    save_checkpoint(folder / LEARNER_FILE, {"learner": learner.state_dict(), "config": config.to_yaml()})


def restore_learner(learner: GFlowNetLearner | DrakesLearner, folder: Path) -> None:
    """Continue from the learner saved in `folder`; raises CheckpointError if it does not fit."""
    try:
        learner.load_state_dict(load_checkpoint(folder / LEARNER_FILE)["learner"])
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / LEARNER_FILE}: does not fit this configuration ({error})") from error


def start_from(learner: GFlowNetLearner | DrakesLearner, config: ExperimentConfig) -> None:
    """Give a new learner the weights that `run.start_from` names, if it does; raises ConfigError if they do not fit."""
    path = config.run.start_from
    if path is None:
        return
    if not isinstance(learner, GFlowNetLearner):
        raise ConfigError("run.start_from goes with generator.name gflownet or forecast")
    try:
        given, weights = load_sampler(path)
        ours, theirs = _architecture(config), _architecture(given)
        differing = [
            f"{key} is {ours[key]} here and {theirs.get(key)} there" for key in ours if ours[key] != theirs.get(key)
        ]
        if differing:
            raise ConfigError(f"run.start_from: the networks of {path} are others: {'; '.join(differing)}")
        learner.start_from(weights)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"run.start_from: {error}") from error


def _architecture(config: ExperimentConfig) -> dict[str, Any]:
    """Everything that the meaning of weights depends on, by key; not the noise, the reward or the oracle."""
    environment = config.environment.model_dump(exclude={"noise"})
    generator = config.generator.model_dump(include={"name", "forward_looking"})
    values = {f"generator.{key}": value for key, value in generator.items()}
    series = {} if config.data is None else config.data.model_dump(exclude=SERIES_SOURCE)
    values |= {f"data.{key}": value for key, value in series.items()}
    values |= {f"environment.{key}": value for key, value in environment.items()}
    values |= {f"network.{key}": value for key, value in config.network.model_dump().items()}
    values |= {f"dynamics.network.{key}": value for key, value in config.dynamics.network.model_dump().items()}
    return values | {f"{key} (objective)": value for key, value in config.objective.policy_heads.items()}


def load_sampler(path: Path) -> tuple[ExperimentConfig, EvaluationWeights]:
    """Configuration and weights from a run folder, a checkpoint folder, a learner file or an exported sampler.

    Of a run folder, the newest readable checkpoint. Raises CheckpointError.
    """
    if path.is_file():
        return _read_sampler(path)
    if (path / LEARNER_FILE).is_file():
        return _read_sampler(path / LEARNER_FILE)
    if (path / DESCRIPTION_FILE).is_file():
        return read_export(path)[:2]
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
        config = validate(parse_yaml(saved["config"], "config"))
        state = saved["learner"]
        check_step(state["step"])
        policy, dynamics, reward = state["averaged"].numpy(), state["dynamics"].numpy(), state.get("reward")
        weights = EvaluationWeights(state["step"], policy, dynamics, None if reward is None else reward.numpy())
        check_weights(weights)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{file}: its content is not that of a checkpoint ({error})") from error
    return config, weights
