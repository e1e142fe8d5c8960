"""One trial of a sweep: an ordinary run in a folder of its own, in a thread that answers to Ray Tune at its evaluations."""

import gc
import hashlib
import json
import logging
import math
import os
import queue
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.search.repeater import TRIAL_INDEX

from distributed.checkpoints import STATE_FILE, load_state
from distributed.config import ConfigError, ExperimentConfig, apply_values, validate
from distributed.mlflow_store import PARENT_TAG
from distributed.run import newest_readable, train_in_folder
from distributed.run_folder import RunFolder, finite, replace_text
from distributed.search_space import Domain, applicable, on_steps
from distributed.training_loop import DONE, FAILED, INTERRUPTED, STOPPED, Hooks

logger = logging.getLogger(__name__)
STEP = "num_learner_steps"
TRIAL_TAG = "trial_id"
STOP_FILE = "stop"
"""Beside the trials' folders while an interrupted sweep waits for its trials to end."""
TAKEN_FILE = "taken.json"
"""In a trial's folder: whose checkpoints it went on from, the last one last (population-based training)."""
END_SECONDS = 120.0
"""How long a trial that is told to stop may save, be judged and report to MLflow."""
LOCK_SECONDS = END_SECONDS + 30.0
"""How long a trial that goes on waits for the process of its earlier life to vanish."""


@dataclass(frozen=True, kw_only=True)
class TrialSetup:
    """What all trials of a sweep share."""

    key: str
    """Of the sweep; with the trial's id, it finds the trial's MLflow run again."""
    base: dict[str, Any]
    """The base experiment."""
    space: dict[str, Domain]
    seeds: tuple[int, ...]
    folder: Path
    """Where the trials' run folders are."""
    working_directory: Path
    """The driver's, to which relative paths of the experiment refer."""
    mlflow_uri: str
    parent: str | None
    """MLflow run of the sweep."""
    metric: str
    mutates: bool
    """Whether values change while a trial runs (population-based training)."""

    def run_key(self, trial_id: str) -> str:
        """Tag by which a trial's MLflow run is found."""
        return f"{self.key}/{trial_id}"

    def config(self, point: dict[str, Any], trial_id: str) -> ExperimentConfig:
        """The whole configuration of a trial."""
        point = dict(point)
        if TRIAL_INDEX in point:  # the search repeats each point, and numbers the repeats
            point["run.seed"] = self.seeds[point.pop(TRIAL_INDEX)]
        values = apply_values(self.base, applicable(self.base, self.space, on_steps(self.space, point)))
        values["run"] = values.get("run", {}) | {"name": trial_id, "output_folder": str(self.folder)}
        values["tracking"] = {"log_model": False} | values.get("tracking", {}) | {"mlflow_uri": self.mlflow_uri}
        return validate(values)


class Trial(tune.Trainable):
    """The trainable: starts, continues after an interruption, or goes on from another trial's checkpoint."""

    _run: "TrialRun | None" = None

    def setup(self, config: dict[str, Any], setup: TrialSetup | None = None) -> None:
        """Called by Tune with the trial's point, and what all trials share."""
        assert setup is not None
        self._setup = setup
        torch.set_num_threads(1)
        self._leave_tunes_folder()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called by Tune to run another trial in this process."""
        self.cleanup()
        self._leave_tunes_folder()
        return True

    def _leave_tunes_folder(self) -> None:
        """Relative paths of the experiment are meant from where the user is."""
        if self._setup.working_directory.is_dir():
            os.chdir(self._setup.working_directory)

    def step(self) -> dict[str, Any]:
        """Train to the next evaluation, or to the end; returns its figures."""
        if self._run is None:
            self._run = TrialRun(self._setup, self._setup.config(self.config, self.trial_id), self.trial_id)
        return self._run.next_figures()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write where the run stands, for another trial or a later continuation."""
        assert self._run is not None
        shutil.copytree(self._run.save(), checkpoint_dir, dirs_exist_ok=True)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Take a checkpoint over, if it is another trial's and new; a trial goes on from its own by itself."""
        take_over(Path(checkpoint), self._setup, self._setup.config(self.config, self.trial_id), self.trial_id)

    def cleanup(self) -> None:
        """End the run, if it is under way, as one that was stopped early."""
        if self._run is not None:
            self._run.end(INTERRUPTED if (self._setup.folder / STOP_FILE).exists() else STOPPED)
            self._run = None
            gc.collect()  # plots and networks refer to themselves; the next trial of this process needs the room
            gc.freeze()  # what is left is here to stay, and need not be looked through each time


class TrialRun:
    """The run of a trial in a thread, halted at every evaluation until it is told what to do."""

    def __init__(self, setup: TrialSetup, config: ExperimentConfig, trial_id: str):
        self._setup, self._stop_file = setup, setup.folder / STOP_FILE
        if not setup.folder.is_dir():
            raise ConfigError(
                f"run.output_folder: {setup.folder} is not visible on this node; a sweep over several hosts needs a folder "
                "on a file system that they share"
            )
        self._folder = RunFolder(config.run.output_folder / trial_id)
        self._config = self._given_or_own(config)
        self._hooks = Hooks(
            run_key=setup.run_key(trial_id),
            tags={TRIAL_TAG: trial_id} | ({PARENT_TAG: setup.parent} if setup.parent else {}),
            figures=self._mutable_values(),
            on_evaluation=self._evaluated,
            stop_reason=lambda: self._reason,
        )
        self._reason: str | None = None
        self._events: queue.Queue[dict[str, Any] | Path | Exception] = queue.Queue()
        self._requests: queue.Queue[str] = queue.Queue()
        self._halted = False
        self._thread = threading.Thread(target=self._train, name="trial", daemon=True)

    def _given_or_own(self, config: ExperimentConfig) -> ExperimentConfig:
        """A run that goes on keeps its values, which are newer than those of a scheduler that was killed."""
        return self._folder.load_config([]) if self._setup.mutates and self._folder.config_file.exists() else config

    def _mutable_values(self) -> dict[str, float]:
        """Swept numbers that may change, which MLflow's parameters cannot show."""
        values: dict[str, float] = {}
        for key in self._setup.space if self._setup.mutates else ():
            section, _, name = key.partition(".")
            value = getattr(getattr(self._config, section), name, None)
            if isinstance(value, (int, float)):
                values[key] = float(value)
        return values

    def next_figures(self) -> dict[str, Any]:
        """Figures of the next evaluation, or of the end (`done`); raises what ended the run.

        Interrupted is not `done`: Tune would not go on with the trial when the sweep is resumed. It may ask once more
        before it stops, and hears the same.
        """
        if self._thread.ident is None:
            self._thread.start()
        elif self._halted:
            self._halted = False
            self._requests.put("go on")
        event = self._next_event()
        assert isinstance(event, dict)
        if event.get("done") is False:
            self._events.put(event)
        return event

    def save(self) -> Path:
        """The newest checkpoint, written now unless the run has ended."""
        if self._halted:
            self._requests.put("save")
            event = self._next_event()
            assert isinstance(event, Path)
            return event
        return self._folder.checkpoints.newest_first()[0]

    def end(self, reason: str) -> None:
        """Let the run save, be judged and end; waits for at most `END_SECONDS`."""
        self._reason = reason
        self._requests.put("go on")
        if self._thread.ident is not None:
            self._thread.join(END_SECONDS)

    def _next_event(self) -> dict[str, Any] | Path:
        while True:
            try:
                event = self._events.get(timeout=1.0)
            except queue.Empty:
                if self._stop_file.exists():
                    self._reason = INTERRUPTED
                continue
            if isinstance(event, Exception):
                raise event
            return event

    def _evaluated(self, step: int, metrics: dict[str, float], write: Callable[[], Path]) -> None:
        """Called by the training loop, in its thread."""
        last = step >= self._config.run.num_learner_steps  # whose figures come with the summary
        if last or self._reason is not None or not math.isfinite(metrics.get(self._setup.metric, math.nan)):
            return
        self._halted = True
        self._events.put(finite({STEP: step} | metrics))
        while self._next_request() == "save":
            try:
                self._events.put(write())
            except OSError as error:
                self._events.put(error)

    def _next_request(self) -> str:
        while True:
            try:
                return self._requests.get(timeout=1.0)
            except queue.Empty:
                if self._stop_file.exists():  # Tune will not ask any more
                    self._reason = INTERRUPTED
                    return "go on"

    def _train(self) -> None:
        try:
            if self._folder.path.is_dir():
                with self._folder.locked(LOCK_SECONDS):
                    pass  # the process of an earlier life has ended
            done = self._done_before()
            if done is not None:
                self._events.put(done)
                return
            _, summary = train_in_folder(self._config, *self._go_on_from(), self._hooks)
            if summary["status"] == FAILED:
                raise TrialFailed(summary["error"] or "the run failed")
            self._events.put(self._last_figures(summary))
        except BaseException as error:  # whatever it is, Tune must hear of it, or it would wait for ever
            logger.error("the trial in %s failed: %s", self._folder.path, error)
            self._events.put(error if isinstance(error, Exception) else TrialFailed(repr(error)))

    def _last_figures(self, summary: dict[str, Any]) -> dict[str, Any]:
        figures = finite(summary)
        if summary["status"] not in (STOPPED, INTERRUPTED) and self._setup.metric not in figures:
            raise TrialFailed(f"sweep.metric: the run ended without a finite {self._setup.metric}")
        return figures | {"done": summary["status"] != INTERRUPTED}

    def _done_before(self) -> dict[str, Any] | None:
        """The last figures of a run that ended, of which Tune had not heard when it was killed."""
        summary = self._folder.read_summary()
        return self._last_figures(summary) if summary.get("status") == DONE else None

    def _go_on_from(self) -> tuple[RunFolder | None, Path | None, dict[str, Any] | None]:
        if not self._folder.config_file.is_file():
            return None, None, None
        if not self._folder.checkpoints.newest_first():
            shutil.rmtree(self._folder.path)  # it ended before its first checkpoint
            return None, None, None
        self._folder.summary_file.unlink(missing_ok=True)  # of an earlier life
        return (self._folder, *newest_readable(self._folder, self._config))


class TrialFailed(RuntimeError):
    """A trial's run ended with an error."""


def take_over(given: Path, setup: TrialSetup, config: ExperimentConfig, trial_id: str) -> None:
    """Make another trial's checkpoint the only one of this trial, and `config` its configuration; once."""
    state = load_state(given)
    if state.get("run_key") == setup.run_key(trial_id):
        return
    folder = RunFolder(config.run.output_folder / trial_id)
    if not folder.config_file.is_file():
        folder = RunFolder.create(config)
    record = {"run_key": state.get("run_key"), "step": state["step"], "config": digest(config)}
    taken = folder.path / TAKEN_FILE
    earlier = json.loads(taken.read_text()) if taken.is_file() else []
    if record in earlier:
        return  # a resumed sweep offers again what this trial went on from long ago
    with folder.locked(LOCK_SECONDS):
        own = folder.checkpoints.folder / f"step_{int(state['step']):09d}"
        copy = folder.checkpoints.folder / f".{own.name}.part"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(given, copy)
        (copy / STATE_FILE).write_text(json.dumps(state | {"run_key": setup.run_key(trial_id)}))
        folder.write_config(config)
        folder.summary_file.unlink(missing_ok=True)
        for old in folder.checkpoints.newest_first():
            shutil.rmtree(old, ignore_errors=True)
        os.replace(copy, own)
        replace_text(taken, json.dumps([*earlier, record]))


def digest(config: ExperimentConfig) -> str:
    """Short name of a configuration."""
    return hashlib.sha256(config.to_yaml().encode()).hexdigest()[:16]
