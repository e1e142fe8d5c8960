"""An MLflow store: what the tracker of a run, a sweep and the comparison of runs ask of it."""

import importlib
import logging
import math
import os
import sqlite3
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from distributed.config import ConfigError, ExperimentConfig
from distributed.config_keys import without_credentials

if TYPE_CHECKING:
    from mlflow.entities import Run

RUN_KEY_TAG = "run_key"
"""Tag by which a resumed run finds the MLflow run it belongs to."""
PARENT_TAG = "mlflow.parentRunId"
ENDED_TAG = "ended"
"""Tag with the run's own word for how it ended, which tells a trial that was stopped early from one that is done."""
MLFLOW_STATUS = {"done": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
MODEL_NAME = "sampler"
MODEL_PACKAGES = ("learner", "actors", "distributed")
"""Our code, which goes with a model."""
MODEL_REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "pydantic", "pyyaml", "safetensors", "rich", "matplotlib",
                      "pyjaspar", "statsmodels")  # fmt: skip
"""What that code needs to sample."""
SEQUENCES = {"n": "long", "seed?": "long"}, {"sequence": "string", "score": "float", "log_policy": "float"}
PATHS = SEQUENCES[0] | {"origin?": "string"}, {"time": "string", "target": "string", "path": "long", "value": "double"}
MODEL_COLUMNS = {"gflownet": SEQUENCES, "drakes": SEQUENCES, "forecast": PATHS}
"""Columns that the model of a generator takes and gives, and their types; ?: need not be there."""
FINAL = "final_"
"""Prefix of the figures that a run logs at its end."""
Curve = tuple[np.ndarray, np.ndarray]
"""Steps int [n], rising, and values float [n], finite."""


def tracking_uri(config: ExperimentConfig) -> str:
    """Where runs are logged: the config, or $MLFLOW_TRACKING_URI, or a sqlite file in this folder.

    A path is absolute, so that it names the same store in every process.
    """
    uri = config.tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = uri.removeprefix("sqlite:///")
    return f"sqlite:///{Path(path).absolute()}" if path != uri else uri


class Store:
    """Reads an MLflow store; every method raises ConfigError, with the store's own words, if it cannot."""

    def __init__(self, uri: str):
        self.uri = without_credentials(uri)
        check_files(uri)
        with self._errors():
            self._client = connect_client(uri)
            found = all_pages(lambda token: self._client.search_experiments(page_token=token))
        self.experiments: dict[str, str] = {experiment.name: experiment.experiment_id for experiment in found}

    def search(self, condition: str, experiments: Sequence[str] | None = None, *, option: str = "") -> "list[Run]":
        """Runs that meet a condition, newest first, in all experiments or those of the given ids.

        `option`: the command's option that gave the condition, which messages name.
        """
        ids = list(self.experiments.values() if experiments is None else experiments)
        with self._errors(option):
            found = all_pages(lambda token: self._client.search_runs(ids, condition, page_token=token))
        return sorted(found, key=age_of)

    def curve(self, run_id: str, key: str) -> Curve:
        """The history of a metric; of a step that was logged twice, as by a resumed run, what was logged last."""
        with self._errors():
            history = self._client.get_metric_history(run_id, key)
        last = {point.step: number_of(point.value) for point in sorted(history, key=lambda point: point.timestamp)}
        steps = [step for step in sorted(last) if math.isfinite(last[step])]
        return np.array(steps, dtype=int), np.array([last[step] for step in steps])

    @contextmanager
    def _errors(self, option: str = "") -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the client raises many types
            refused = option and getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
            raise ConfigError(f"{option if refused else f'MLflow at {self.uri}'}: {cause_of(error)}") from error


def check_files(uri: str) -> None:
    """Raises ConfigError if `uri` names files that are no store, which MLflow would make into one."""
    try:
        parts = urlsplit(uri)
        if parts.scheme.startswith("sqlite"):
            path = Path(parts.path.removeprefix("/")).absolute()
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
                database.execute("SELECT 1 FROM experiments LIMIT 1")
        elif parts.scheme in ("", "file") and uri != "databricks" and not Path(parts.path).is_dir():
            raise OSError("no such folder")
    except (OSError, ValueError, sqlite3.Error) as error:
        raise ConfigError(f"{without_credentials(uri)}: there is no MLflow store ({error})") from error


def all_pages(read: Callable[[str | None], Any]) -> list[Any]:
    """Everything that `read(page token)` finds."""
    page = read(None)
    found = list(page)
    while page.token:
        page = read(page.token)
        found += page
    return found


def age_of(run: "Run") -> int:
    """Sorts the newest run first."""
    return -(run.info.start_time or 0)


def number_of(value: float) -> float:
    """MLflow's databases hold the largest float in the place of infinity."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


def cause_of(error: Exception) -> str:
    """A client's error in one line, without credentials; of a long one both ends, as the cause comes last."""
    line = without_credentials((str(error).strip().splitlines() or [type(error).__name__])[0])
    return line if len(line) <= 400 else f"{line[:150]} … {line[-240:]}"


def connect_client(uri: str) -> Any:
    """A client that gives up early, and says little."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def experiment_id(client: Any, name: str) -> str:
    """The id of the experiment `name`, which is made if there is none."""
    experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id if experiment else client.create_experiment(name)


def find_run(client: Any, experiment: str, key: str) -> str | None:
    """The run that carries the tag `run_key`."""
    found = client.search_runs([experiment], f"tags.{RUN_KEY_TAG} = '{key}'", max_results=1)
    return found[0].info.run_id if found else None


def find_children(client: Any, experiment: str, parent: str | None) -> list[Any]:
    """All runs whose parent is the run `parent`."""
    condition = f"tags.`{PARENT_TAG}` = '{parent}'"
    return all_pages(lambda token: client.search_runs([experiment], condition, max_results=500, page_token=token))


def end_run(client: Any, run_id: str | None, ended: str) -> None:
    """Set how a run ended (a key of `MLFLOW_STATUS`)."""
    client.set_tag(run_id, ENDED_TAG, ended)
    client.set_terminated(run_id, MLFLOW_STATUS[ended])


def log_sampler(client: Any, experiment: str, run_id: str | None, exported: Path, generator: str) -> None:
    """Log an exported sampler as the pyfunc model `sampler` of a run, with our code, so that MLflow can sample anywhere.

    MLflow's own `log_model` logs to the active run of a process, of which a sweep's or a notebook's may have another.
    """
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model, ModelSignature

    asked, given = MODEL_COLUMNS[generator]
    packages = [Path(importlib.import_module(name).__file__ or "").parent for name in MODEL_PACKAGES]
    logged = client.create_logged_model(experiment, name=MODEL_NAME, source_run_id=run_id)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*input example was not provided"
        )  # MLflow would ask the oracle for its scores
        mlflow.pyfunc.save_model(
            f"{folder}/model",
            python_model=str(Path(__file__).with_name("mlflow_model.py")),
            artifacts={MODEL_NAME: str(exported)},
            code_paths=[str(package) for package in packages],
            signature=ModelSignature(_schema(asked), _schema(given)),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in MODEL_REQUIREMENTS],
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_id=logged.model_id,
                model_uuid=logged.model_id,
            ),
        )
        client.log_model_artifacts(logged.model_id, f"{folder}/model")
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])


def _schema(columns: Mapping[str, str]) -> Any:
    from mlflow.types import ColSpec, Schema

    return Schema([ColSpec(kind, name.rstrip("?"), required="?" not in name) for name, kind in columns.items()])
