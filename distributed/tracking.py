"""MLflow, in a thread of its own: a store that is slow, or down, never slows or stops training."""

import logging
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from distributed.checkpoints import load_sampler
from distributed.config import ExperimentConfig
from distributed.config_keys import without_credentials
from distributed.exported import write_export
from distributed.mlflow_store import (
    ENDED_TAG,
    FINAL,
    MODEL_NAME,
    RUN_KEY_TAG,
    cause_of,
    connect_client,
    end_run,
    experiment_id,
    find_children,
    find_run,
    log_sampler,
    tracking_uri,
)
from distributed.run_folder import finite

logger = logging.getLogger(__name__)
MAX_BACKLOG = 20_000
"""Records kept while the store is unreachable; beyond, the oldest go (metrics.jsonl has them all)."""
MAX_METRICS_A_CALL = 1000
CLOSE_SECONDS = 30.0
"""How long the end of a run waits for the store."""


class MlflowTracker:
    """Sends parameters, metrics and artifacts of one run; every method returns at once."""

    def __init__(self, config: ExperimentConfig, *, run_key: str, tags: dict[str, str] | None = None):
        """Continues the MLflow run that carries the tag `run_key`, or makes one, with `tags` besides."""
        self._config, self._run_key, self._tags = config, run_key, tags or {}
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

    def close(
        self, status: str, artifacts: list[Path], summary: dict[str, Any], checkpoint: Path | None = None
    ) -> None:
        """Send what is left, the artifacts, the final figures, how the run ended (a key of `MLFLOW_STATUS`), and the sampler in
        `checkpoint` as a model.

        Waits for at most `CLOSE_SECONDS`.
        """
        figures = {f"{FINAL}{name}": value for name, value in finite(summary).items()}
        self.log(int(summary.get("num_learner_steps", 0)), figures)
        self._last_words = [partial(self._send_artifact, path) for path in artifacts]
        self._last_words.append(lambda client: end_run(client, self.run_id, status))
        if checkpoint is not None:
            self._last_words.append(partial(self._send_model, checkpoint, summary))
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._given_up = True
            logger.warning(
                "MLflow at %s did not take the end of the run in time; see metrics.jsonl and summary.json",
                without_credentials(self._uri),
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
                        cause_of(error),
                    )
                    self._warned = True
                self._wake.wait(1.0 if self._closing else pause)
                pause = min(30.0, 2 * pause)

    def _connect(self) -> Any:
        client = connect_client(self._uri)
        from mlflow.entities import Param

        experiment = experiment_id(client, self._config.tracking.experiment)
        self.run_id = find_run(client, experiment, self._run_key)
        if self.run_id is not None:
            client.update_run(self.run_id, status="RUNNING")
            return client
        tags = {RUN_KEY_TAG: self._run_key, **self._tags}
        self.run_id = client.create_run(experiment, run_name=self._config.run.name, tags=tags).info.run_id
        self._parameters = [
            Param(key, str(value)[:6000]) for key, value in flatten(self._config.model_dump(mode="json"))
        ]
        return client

    def _send_artifact(self, path: Path, client: Any) -> None:
        client.log_artifact(self.run_id, str(path), {".png": "plots", ".pt": "model"}.get(path.suffix))

    def _send_model(self, checkpoint: Path, summary: dict[str, Any], client: Any) -> None:
        """Once, and after all else: a store that takes no models has everything but the model."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                config, weights = load_sampler(checkpoint)
                exported = write_export(Path(folder) / MODEL_NAME, config, weights, summary)
                experiment = client.get_run(self.run_id).info.experiment_id
                log_sampler(client, experiment, self.run_id, exported, config.generator.name)
        except Exception as error:  # the client raises many types
            logger.warning("the model was not logged to MLflow (%s); see %s", cause_of(error), checkpoint)

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


class SweepTracker:
    """The MLflow run of a sweep, parent of its trials'.

    Written by the driver, which waits for the store; one that cannot be reached is a warning.
    """

    def __init__(self, config: ExperimentConfig, key: str, name: str, parameters: dict[str, Any]):
        """Find the parent run by `key`, or make it; before any trial starts, so that none has to make the store."""
        self.run_id: str | None = None
        self._client: Any = None
        if config.tracking.mlflow:
            self._try(lambda: self._open(config, key, name, parameters))

    def _open(self, config: ExperimentConfig, key: str, name: str, parameters: dict[str, Any]) -> None:
        from mlflow.entities import Param

        self._client = connect_client(tracking_uri(config))
        self._experiment = experiment_id(self._client, config.tracking.experiment)
        self.run_id = find_run(self._client, self._experiment, key)
        if self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            return
        run_id = self._client.create_run(self._experiment, run_name=name, tags={RUN_KEY_TAG: key}).info.run_id
        params = [Param(name, str(value)[:6000]) for name, value in flatten(parameters)]
        for start in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[start : start + 100])
        self.run_id = run_id

    def close(self, ended: str, trials: dict[str, str], artifacts: list[Path], figures: dict[str, float]) -> None:
        """Log the report and end the parent run, and see that every trial's run ended as `trials` (run key -> how) says.

        A trial that was killed could not say so itself; one that is not listed, and seems to run, counts as interrupted.
        """
        if self.run_id is None:
            return

        def end() -> None:
            for child in find_children(self._client, self._experiment, self.run_id):
                status = trials.get(child.data.tags.get(RUN_KEY_TAG, ""))
                if status is None and child.info.status == "RUNNING":
                    status = "interrupted"
                if status is not None and child.data.tags.get(ENDED_TAG) != status:
                    end_run(self._client, child.info.run_id, status)
            for name, value in figures.items():
                self._client.log_metric(self.run_id, name, value)
            end_run(self._client, self.run_id, ended)

        def log_artifacts() -> None:
            for path in artifacts:
                self._client.log_artifact(self.run_id, str(path))

        self._try(end)
        self._try(log_artifacts)

    @staticmethod
    def _try(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # the client raises many types; none of them may end a sweep
            logger.warning("MLflow: %s; the sweep goes on without", cause_of(error))


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("section.key", value) of nested mappings."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs
