"""A trained sampler as one folder: weights (safetensors), configuration and summary (JSON), and its data files.

Unlike a checkpoint it holds nothing that only training needs, any program can read it, and it can be moved: paths in its
configuration are relative to it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from distributed.config import ConfigError, ExperimentConfig, apply_values, validate
from distributed.yaml_text import read_limited
from learner.checkpoint import MAX_CHECKPOINT_BYTES, CheckpointError
from learner.gflownet import EvaluationWeights, check_step

WEIGHTS_FILE, DESCRIPTION_FILE, DATA_FOLDER = "sampler.safetensors", "sampler.json", "data"
FORMAT_VERSION = 1
MAX_DESCRIPTION_BYTES = 2_000_000
DATA_KEYS = ("oracle.path", "oracle.tokens_path", "oracle.scores_path", "replay.offline_path", "data.path")
"""Keys that name a file which sampling and evaluation read."""


def write_export(folder: Path, config: ExperimentConfig, weights: EvaluationWeights, summary: dict[str, Any]) -> Path:
    """Write `folder`, whole or not at all, and return it; raises ConfigError if it exists or cannot be written."""
    if folder.exists():
        raise ConfigError(f"{folder}: exists; allowed: a new folder")
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        description = {
            "format_version": FORMAT_VERSION,
            "num_learner_steps": weights.step,
            "config": _with_data(config, temporary),
            "summary": summary,
        }
        tensors = {"policy": weights.policy, "dynamics": weights.dynamics, "reward": weights.reward}
        save_file({name: array for name, array in tensors.items() if array is not None}, temporary / WEIGHTS_FILE)
        (temporary / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _with_data(config: ExperimentConfig, folder: Path) -> dict[str, Any]:
    """The configuration with the files that it names copied into `folder`, and named relative to it."""
    values = config.model_dump(mode="json")
    changes = {}
    for key, source in _data_files(values).items():
        changes[key] = f"{DATA_FOLDER}/{key.replace('.', '_')}{Path(source).suffix}"
        (folder / DATA_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(source, folder / changes[key])
    return apply_values(values, changes)


def _data_files(values: dict[str, Any]) -> dict[str, str]:
    """Those of `DATA_KEYS` that a configuration has, and their files."""
    pairs = {key: key.split(".") for key in DATA_KEYS}
    named = {key: (values.get(section) or {}).get(name) for key, (section, name) in pairs.items()}
    return {key: file for key, file in named.items() if file is not None}


def read_export(folder: Path) -> tuple[ExperimentConfig, EvaluationWeights, dict[str, Any]]:
    """Configuration, weights and summary in an exported folder; raises CheckpointError."""
    file = folder / DESCRIPTION_FILE
    try:
        description = json.loads(read_limited(file, MAX_DESCRIPTION_BYTES))
        if not isinstance(description, dict) or description.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"not an exported sampler of format version {FORMAT_VERSION}")
        values, summary = description["config"], description["summary"]
        check_step(description["num_learner_steps"])
        config = validate(apply_values(values, {k: str(folder / v) for k, v in _data_files(values).items()}))
        file = folder / WEIGHTS_FILE
        if file.stat().st_size > MAX_CHECKPOINT_BYTES:
            raise ValueError(f"larger than {MAX_CHECKPOINT_BYTES:,} bytes")
        tensors = load_file(file)
        weights = EvaluationWeights(
            description["num_learner_steps"], tensors["policy"], tensors["dynamics"], tensors.get("reward")
        )
        check_weights(weights)
    except KeyError as error:
        raise CheckpointError(f"{file}: damaged (has no {error})") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or damaged ({error})") from error
    return config, weights, summary


def check_weights(weights: EvaluationWeights) -> None:
    """Raises ValueError for anything but vectors of finite numbers."""
    for vector in (vector for vector in weights[1:] if vector is not None):
        if vector.dtype != np.float32 or vector.ndim != 1 or not np.isfinite(vector).all():
            raise ValueError("weights are not a list of finite numbers")
