"""MLflow, in a thread of its own: a store that is slow, or down, never slows or stops training."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from distributed.config import ExperimentConfig, without_credentials

logger = logging.getLogger(__name__)
MAX_BACKLOG = 20_000
"""Records kept while the store is unreachable; beyond, the oldest go (metrics.jsonl has them all)."""
MAX_METRICS_A_CALL = 1000
RUN_KEY_TAG = "run_key"
"""Tag by which a resumed run finds the MLflow run it belongs to."""
CLOSE_SECONDS = 30.0
"""How long the end of a run waits for the store."""


def tracking_uri(config: ExperimentConfig) -> str:
    """Where runs are logged: the config, or $MLFLOW_TRACKING_URI, or a sqlite file in this folder."""
    return config.tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


class MlflowTracker:
    """Sends parameters, metrics and artifacts of one run; every method returns at once."""

    def __init__(self, config: ExperimentConfig, *, run_key: str):
        """Continues the MLflow run that carries the tag `run_key`, or makes one."""
        self._config, self._run_key = config, run_key
        self.run_id: str | None = None
        self._uri = tracking_uri(config)
        self._backlog: deque[tuple[int, int, dict[str, float]]] = deque(maxlen=MAX_BACKLOG)
        self._last_words: list[Callable[[Any], None]] = []
        self._wake, self._closing, self._given_up, self._warned = threading.Event(), False, False, False
        self._client: Any = None
        self._parameters: list[Any] = []
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Queue metrics of a learner step."""
        self._backlog.append((step, int(time.time() * 1000), metrics))
        self._wake.set()

    def close(self, status: str, artifacts: list[Path], summary: dict[str, Any]) -> None:
        """Send what is left, the artifacts, the final figures and the status (FINISHED, FAILED or KILLED).

        Waits for at most `CLOSE_SECONDS`.
        """
        numbers = {k: float(v) for k, v in summary.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        self.log(int(summary.get("num_learner_steps", 0)), {f"final_{name}": value for name, value in numbers.items()})
        self._last_words = [partial(self._send_artifact, path) for path in artifacts]
        self._last_words.append(lambda client: client.set_terminated(self.run_id, status))
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._given_up = True
            logger.warning(
                "MLflow at %s did not take the end of the run in time; see metrics.jsonl and summary.json", self._uri
            )

    def _work(self) -> None:
        pause = 1.0
        while not self._given_up:
            self._wake.wait(timeout=1.0)
            self._wake.clear()
            try:
                self._client = self._client or self._connect()
                self._send_backlog()
                if self._closing and not self._backlog:
                    while self._last_words:
                        self._last_words[0](self._client)
                        del self._last_words[0]
                    return
                pause = 1.0
            except Exception as error:  # the client raises many types; none of them may reach training
                if not self._warned:
                    logger.warning(
                        "MLflow at %s is unreachable (%s); metrics are kept and sent later",
                        without_credentials(self._uri),
                        without_credentials(_first_line(error)),
                    )
                    self._warned = True
                self._wake.wait(1.0 if self._closing else pause)
                pause = min(30.0, 2 * pause)

    def _connect(self) -> Any:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self._uri)
        name = self._config.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        found = client.search_runs([experiment_id], f"tags.{RUN_KEY_TAG} = '{self._run_key}'", max_results=1)
        if found:
            self.run_id = found[0].info.run_id
            client.update_run(self.run_id, status="RUNNING")
            return client
        tags = {RUN_KEY_TAG: self._run_key}
        self.run_id = client.create_run(experiment_id, run_name=self._config.run.name, tags=tags).info.run_id
        self._parameters = [
            Param(key, str(value)[:6000]) for key, value in flatten(self._config.model_dump(mode="json"))
        ]
        return client

    def _send_artifact(self, path: Path, client: Any) -> None:
        client.log_artifact(self.run_id, str(path), {".png": "plots", ".pt": "model"}.get(path.suffix))

    def _send_backlog(self) -> None:
        from mlflow.entities import Metric

        while self._parameters:
            self._client.log_batch(self.run_id, params=self._parameters[:100])
            del self._parameters[:100]
        while self._backlog:
            taken: list[tuple[int, int, dict[str, float]]] = []
            metrics: list[Any] = []
            while self._backlog and len(metrics) < MAX_METRICS_A_CALL - 100:
                taken.append(self._backlog.popleft())
                step, when, values = taken[-1]
                metrics += [Metric(name, float(value), when, step) for name, value in values.items()]
            try:
                self._client.log_batch(self.run_id, metrics=metrics)
            except Exception:
                self._backlog.extendleft(reversed(taken))
                raise


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("section.key", value) of nested mappings."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
