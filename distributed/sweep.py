"""Sweep with Ray Tune:  python -m distributed.sweep SWEEP.yaml [--section.key value …] [--resume DIR]

Every trial is a run with learner, buffer and rollout actors of its own. Leaves a folder with a run folder for each trial,
results.csv, points.csv, a plot, and best.yaml, the best point ready to run. Ctrl-C ends cleanly; --resume goes on, also
after a crash. Resume only sweeps of your own: Ray Tune keeps its state as pickles.
"""

import argparse
import logging
import shutil
import uuid
from pathlib import Path

import yaml

from distributed import cli
from distributed.backend import RunFailed
from distributed.config import ConfigError, apply_overrides, read_yaml, validate
from distributed.config_keys import describe_fields, validate_section, without_credentials
from distributed.mlflow_store import tracking_uri
from distributed.progress import configure_logging
from distributed.run_folder import default_name, making
from distributed.search_space import check_space
from distributed.sweep_config import SWEEP_FILE, Sweep, SweepConfig, load_sweep
from distributed.tuning import TRIALS_FOLDER, find_metric, run_sweep

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m distributed.sweep", description=__doc__, epilog=_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", nargs="?", type=Path, help="YAML file with a section sweep")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="continue the sweep in this folder")
    options, overrides = cli.parse_with_overrides(parser, arguments)
    configure_logging()
    if (options.config is None) == (options.resume is None):
        raise ConfigError("give either a sweep's YAML file, or --resume with its folder")
    if options.resume is not None:
        if overrides:
            raise ConfigError("--resume goes on with the sweep as it was; no keys can be changed")
        sweep = load_sweep(options.resume)
    else:
        sweep = _create(options.config, overrides)
    logger.info("sweep folder %s", sweep.folder)
    try:
        return run_sweep(sweep, resumed=options.resume is not None)
    except (ConfigError, RunFailed) as error:
        if options.resume is None and not (sweep.folder / TRIALS_FOLDER).exists():  # made just now, and nothing began
            shutil.rmtree(sweep.folder)
        if isinstance(error, ConfigError):
            raise
        logger.error("%s", error)
        return cli.EXIT_FAILED


def _help() -> str:
    lines = ["keys of the section sweep (the others are those of a run, see python -m distributed.run --help):"]
    for key, default, text in describe_fields(SweepConfig, "sweep."):
        lines.append(f"  {key}  (default {default})\n        {text}")
    return "\n".join(lines)


def _create(file: Path, overrides: list[tuple[str, str]]) -> Sweep:
    """A new sweep's folder, after everything that can be checked was; raises ConfigError."""
    values = apply_overrides(read_yaml(file), overrides)
    section = values.pop("sweep", None)
    if section is None:
        raise ConfigError(f"{file}: has no section sweep; see tune_configs/sweep_gamma.yaml for one")
    config = validate_section(SweepConfig, "sweep", section)
    check_space(values, config.space)
    base = validate(values)
    name = base.run.name or default_name(file)
    values.get("run", {}).pop("name", None)
    folder = (base.run.output_folder / name).absolute()
    uri = tracking_uri(base)
    if without_credentials(uri) != uri:
        raise ConfigError(
            "MLFLOW_TRACKING_URI: no user or password is allowed in a sweep's, which is written down; use "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    sweep = Sweep(
        key=uuid.uuid4().hex, name=name, folder=folder, config=config, base=values, metric=find_metric(config, base),
        mlflow_uri=uri, working_directory=Path.cwd(),
    )  # fmt: skip
    if config.search == "random":
        logger.info("%d points, %d trials", len(sweep.points), len(sweep.points) * len(sweep.seeds))
    with making(folder):
        (folder / SWEEP_FILE).write_text(yaml.safe_dump(sweep.to_dict(), sort_keys=False))
    return sweep


if __name__ == "__main__":
    cli.exit_with(main)
