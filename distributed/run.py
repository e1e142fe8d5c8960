"""Train a sampler:  python -m distributed.run [CONFIG.yaml] [--section.key value …] [--resume RUN_DIR]

Without a config, the default task: stochastic GFlowNet on measured DNA binding (TFBind8). Leaves a folder runs/<name>/.
Resume only runs you trust: their config names the oracle, and a function is imported and run.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import OracleDataError
from actors.replay_buffer import SavedBufferError
from distributed import cli
from distributed.backend import Backend
from distributed.checkpoints import BUFFER_FILE, load_state, restore_learner, start_from
from distributed.config import DEFAULT_CONFIG, ConfigError, ConfigSource, ExperimentConfig, parse_values, resolve_config
from distributed.experiment import (
    check_memory,
    make_environment,
    make_learner,
    make_oracle,
    make_replay_buffer,
    offline_sequences,
)
from distributed.families import AnyEvaluator, make_evaluator
from distributed.progress import configure_logging, print_summary
from distributed.run_folder import RunFolder, default_name
from distributed.training_loop import DONE, INTERRUPTED, Hooks, TrainingLoop
from learner.checkpoint import CheckpointError
from learner.gflownet import resolve_device

logger = logging.getLogger(__name__)
EXIT_CODES = {DONE: cli.EXIT_DONE, INTERRUPTED: cli.EXIT_INTERRUPTED}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m distributed.run", description=__doc__, epilog=cli.config_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", nargs="?", type=Path, default=None, help=f"YAML file (default {DEFAULT_CONFIG.name})")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="continue the run in this folder")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    options, overrides = cli.parse_with_overrides(parser, arguments)
    configure_logging()
    folder, checkpoint, state = None, None, None
    if options.resume is not None:
        if options.config is not None:
            raise ConfigError("--resume takes the config of the run; give no config file beside it")
        config, folder, checkpoint, state = to_resume(options.resume, parse_values(overrides))
    else:
        config = named_config(options.config, parse_values(overrides))
    if options.print_config:
        print(config.to_yaml(), end="")
        return cli.EXIT_DONE
    return train(config, folder, checkpoint, state)


def named_config(source: ConfigSource, changes: Mapping[str, Any]) -> ExperimentConfig:
    """The configuration of a new run, changed by `changes` (dotted key -> value), with a name; raises ConfigError."""
    config = resolve_config(source, changes)
    if config.run.name is not None:
        return config
    name = default_name(source if isinstance(source, Path) else DEFAULT_CONFIG if source is None else Path("run"))
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def to_resume(path: Path, changes: Mapping[str, Any]) -> tuple[ExperimentConfig, RunFolder, Path, dict[str, Any]]:
    """Configuration, changed by `changes`, folder, checkpoint and its state, of a run to go on with; raises ConfigError."""
    folder = RunFolder.open(path)
    config = resolve_config(folder.config_file, changes)
    if config.run.backend != folder.load_config([]).run.backend:
        raise ConfigError("run.backend: a run is continued on the backend that it was started on")
    return (config, folder, *newest_readable(folder, config))


def train(
    config: ExperimentConfig, folder: RunFolder | None, checkpoint: Path | None, state: dict[str, Any] | None
) -> int:
    """Run, and print the summary; returns the exit code."""
    folder, summary = train_in_folder(config, folder, checkpoint, state)
    print_summary(summary, f"{config.run.name}: {summary['status']}", str(folder.path))
    return EXIT_CODES.get(summary["status"], cli.EXIT_FAILED)


def train_in_folder(
    config: ExperimentConfig,
    folder: RunFolder | None,
    checkpoint: Path | None,
    state: dict[str, Any] | None,
    hooks: Hooks | None = None,
) -> tuple[RunFolder, dict[str, Any]]:
    """Check everything that can be checked, make the run folder unless it is given, and run; returns folder and summary."""
    environment = make_environment(config)
    evaluator = prepare(config, environment, resumed=folder is not None)
    try:
        if folder is None:
            folder = RunFolder.create(config)
        logger.info("run folder %s", folder.path)
        with folder.locked():
            if checkpoint is not None and state is not None:
                folder.write_config(config)
                folder.forget_metrics_after(state["step"])
                folder.checkpoints.set_aside_newer(checkpoint)
            loop = TrainingLoop(config, folder, make_backend(config, folder), evaluator, hooks)
            return folder, loop.run(checkpoint, state)
    finally:
        evaluator.oracle.close()


def prepare(config: ExperimentConfig, environment: SequenceEnvironment, *, resumed: bool) -> AnyEvaluator:
    """Load the oracle and enumerate the target; whatever is wrong with data or sizes is a ConfigError now."""
    try:
        check_memory(config, training=True)
        if config.run.backend == "serial":
            resolve_device(config.learner.device)
        if not resumed and config.run.start_from is not None:
            start_from(make_learner(config, device="cpu"), config)
        oracle = make_oracle(config, environment)
        if not resumed:  # a checkpoint holds the offline data
            offline_sequences(config, environment, oracle)
        return make_evaluator(config, environment, oracle)
    except (OracleDataError, ValueError) as error:
        raise ConfigError(str(error)) from error


def make_backend(config: ExperimentConfig, folder: RunFolder) -> Backend:
    """The backend that `run.backend` names; Ray is imported only if it is used."""
    if config.run.backend == "serial":
        from distributed.local_backend import SerialBackend

        return SerialBackend(config)
    from distributed.ray_backend import RayBackend

    return RayBackend(config, folder.checkpoints)


def newest_readable(folder: RunFolder, config: ExperimentConfig) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that `config` can go on from, and its state; raises ConfigError if there is none."""
    try:
        check_memory(config, training=True)
        learner = make_learner(config, device="cpu")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    faults = []
    for checkpoint in folder.checkpoints.newest_first():
        try:
            restore_learner(learner, checkpoint)
            make_replay_buffer(config).load(checkpoint / BUFFER_FILE)
            return checkpoint, load_state(checkpoint)
        except (CheckpointError, SavedBufferError) as error:
            logger.warning("%s; trying an older checkpoint", error)
            faults.append(str(error))
    raise ConfigError(f"--resume: {folder.path} holds no checkpoint to go on from. {'; '.join(faults)}")


if __name__ == "__main__":
    cli.exit_with(main)
