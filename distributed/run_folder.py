"""The folder of a run: resolved config, metrics, checkpoints, plots, summary, report."""

import errno
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed.checkpoints import CheckpointStore
from distributed.config import ConfigError, ExperimentConfig, load_config
from distributed.yaml_text import read_limited

MAX_SUMMARY_BYTES = 1_000_000

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells a submitted job its settings."""
UNPACKED = "working_dir_files"
"""Folder of Ray's into which it unpacks the working directories of jobs."""


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file, self.metrics_file = path / "config.yaml", path / "metrics.jsonl"
        self.summary_file, self.plots = path / "summary.json", path / "plots"
        self.modes_file, self.report_file = path / "modes.csv", path / "report.html"
        self.checkpoints = CheckpointStore(path / "checkpoints")

    @classmethod
    def create(cls, config: ExperimentConfig) -> "RunFolder":
        """A new folder with the resolved config; raises ConfigError if it exists or cannot be made."""
        assert config.run.name is not None
        folder = cls(config.run.output_folder / config.run.name)
        if folder._never_began():
            shutil.rmtree(folder.path)
        with making(folder.path):
            folder.plots.mkdir()
            folder.write_config(config)
        return folder

    def _never_began(self) -> bool:
        """Whether this folder holds what a run that could not start leaves, and nothing else."""
        if self.path.is_symlink() or not (self.config_file.is_file() and self.plots.is_dir()):
            return False
        own = {self.path / "lock", self.config_file, self.summary_file, self.report_file, self.plots}
        own.add(self.checkpoints.folder)
        return set(self.path.rglob("*")) <= own

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing folder; raises ConfigError if it is none."""
        folder = cls(path)
        if not folder.config_file.is_file():
            raise ConfigError(f"{path}: not a run folder (it has no config.yaml)")
        return folder

    def load_config(self, overrides: list[tuple[str, str]]) -> ExperimentConfig:
        """The config of the run, changed by `overrides`; raises ConfigError."""
        return load_config(self.config_file, overrides)

    def write_config(self, config: ExperimentConfig) -> None:
        """Write config.yaml, whole or not at all; raises OSError."""
        replace_text(self.config_file, config.to_yaml())

    @contextmanager
    def locked(self, wait_seconds: float = 0.0) -> Iterator[None]:
        """Keep other processes from writing into this folder; raises ConfigError if one still does after that wait."""
        deadline = time.monotonic() + wait_seconds
        with open(self.path / "lock", "w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise ConfigError(f"{self.path}: another process is running this run") from None
                    time.sleep(0.2)
            yield

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, whole or not at all; raises OSError."""
        with open(self.metrics_file, "ab", buffering=0) as file:
            size, line = file.tell(), json.dumps(record).encode() + b"\n"
            try:
                written = file.write(line)
                if written < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.metrics_file))
            except OSError:
                file.truncate(size)
                raise

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The records of metrics.jsonl; a line cut short by a crash, or damaged otherwise, is passed over."""
        if not self.metrics_file.exists():
            return
        with open(self.metrics_file, errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    yield {name: value for name, value in record.items() if isinstance(value, (int, float))}

    def forget_metrics_after(self, step: int) -> None:
        """Drop the records of steps that a resumed run takes again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        replace_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, whole or not at all; raises OSError."""
        replace_text(self.summary_file, to_json(summary) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """The final figures; empty if there are none, or they were cut short."""
        try:
            summary = json.loads(read_limited(self.summary_file, MAX_SUMMARY_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        return summary if isinstance(summary, dict) else {}


def submitted_job() -> dict[str, Any] | None:
    """The runtime environment of the job that `ray job submit` started this process for; None: there is no such job."""
    text = os.environ.get(JOB_CONFIG)
    return None if text is None else json.loads(text).get("runtime_env") or {}


@contextmanager
def making(path: Path) -> Iterator[None]:
    """Make the folder of a run or a sweep, and write into it; raises ConfigError if it exists, or could not be kept."""
    if submitted_job() is not None and UNPACKED in path.absolute().parts:
        raise ConfigError(
            f"run.output_folder: {path.parent} is in the folder that Ray unpacked for this job, and deletes after it; "
            "give an absolute path"
        )
    try:
        path.mkdir(parents=True)
        yield
    except FileExistsError:
        raise ConfigError(
            f"run.name: the folder {path} exists; choose another name, or continue it with --resume {path}"
        ) from None
    except OSError as error:
        raise ConfigError(f"run.output_folder: {path} cannot be made ({error})") from error


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; raises OSError."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def finite(figures: dict[str, Any]) -> dict[str, float]:
    """Those that are finite numbers."""
    numbers = {k: float(v) for k, v in figures.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def to_json(figures: dict[str, Any]) -> str:
    """Figures as a JSON object; null where a figure is infinite or not a number."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
    return json.dumps(plain, indent=2, allow_nan=False)


def default_name(config_file: Path) -> str:
    """A name from the config's file name and the time."""
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in config_file.stem).lstrip("._-") or "run"
    return f"{stem[:60]}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
