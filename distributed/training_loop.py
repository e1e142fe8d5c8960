"""One training loop for every backend: step, record, evaluate, save, stop."""

import logging
import math
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from actors.oracles.base import OracleError
from distributed.backend import Backend, RunFailed, StepResult
from distributed.checkpoints import LEARNER_FILE
from distributed.config import ExperimentConfig
from distributed.families import AnyEvaluator, judge
from distributed.progress import ProgressLine
from distributed.run_folder import RunFolder, finite
from distributed.tracking import MlflowTracker
from learner.gflownet import EvaluationWeights

logger = logging.getLogger(__name__)
DONE, STOPPED, INTERRUPTED, FAILED = "done", "stopped", "interrupted", "failed"
"""How a run ended: by itself, early by a sweep's scheduler, by the user, or with an error."""


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a request that the loop honours between two steps; a second Ctrl-C stops at once."""

    def __init__(self, *, listens: bool = True) -> None:
        self.requested, self._listens = False, listens
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if not self._listens or threading.current_thread() is not threading.main_thread():
            return self  # a notebook, or a trial of a sweep; see `Hooks`
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals, also from a library that took them meanwhile, as Ray does when it starts."""
        for number in self._previous:
            signal.signal(number, self._request)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after this step and saving; press Ctrl-C again to stop at once")


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a sweep, or a program that calls the API, adds to a run."""

    interactive: bool = True
    """Whether Ctrl-C and SIGTERM end the run after the step under way, and a terminal shows a progress bar."""
    run_key: str | None = None
    """Key by which MLflow's run is found again; None: a new one, kept in the checkpoints."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of MLflow's run."""
    figures: dict[str, float] = field(default_factory=dict)
    """Logged once, when the run starts or goes on."""
    on_evaluation: Callable[[int, dict[str, float], Callable[[], Path]], None] | None = None
    """Called with the learner step, the metrics of an evaluation, and a function that writes a checkpoint."""
    stop_reason: Callable[[], str | None] = lambda: None
    """Asked after every step: the status with which the run shall end now, or None to go on."""


class TrainingLoop:
    """Drives a backend until the run is done, and leaves a complete run folder."""

    def __init__(
        self,
        config: ExperimentConfig,
        folder: RunFolder,
        backend: Backend,
        evaluator: AnyEvaluator,
        hooks: Hooks | None = None,
    ):
        self.config, self.folder, self.backend, self.evaluator = config, folder, backend, evaluator
        self.hooks = hooks or Hooks()
        self.step = 0
        self._run_key = uuid.uuid4().hex
        self._tracker: MlflowTracker | None = None
        self._started, self._earlier_seconds = time.monotonic(), 0.0
        self._sums: dict[str, list[float]] = {}
        self._next_record, self._next_evaluation = 0, 0
        self._last_save = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._evaluation: Future[tuple[int, dict[str, float]]] | None = None
        self._met: str | None = None
        self._reason: str | None = None

    def run(self, checkpoint: Path | None, state: dict[str, Any] | None) -> dict[str, Any]:
        """Train, from `checkpoint` and its `state` if given; returns the summary, whose `status` says how it ended."""
        state = state or {}
        self.step, self._earlier_seconds = state.get("step", 0), state.get("wall_seconds", 0.0)
        self._run_key = self.hooks.run_key or state.get("run_key", self._run_key)
        self._plan_evaluation()
        if self.config.tracking.mlflow:
            self._tracker = MlflowTracker(self.config, run_key=self._run_key, tags=self.hooks.tags)
        status, error = FAILED, None
        try:
            with self._signals() as stop, self._progress() as progress:
                try:
                    self._train(checkpoint, stop, progress)
                    status = self._stop_reason(stop) or DONE
                except KeyboardInterrupt:
                    status = INTERRUPTED
                    raise
                except (RunFailed, OracleError, OSError) as failure:
                    error = failure
                    logger.error("%s", failure)
                return self._finish(status, error)
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self.backend.close()
            if self._tracker is not None:  # left in a hurry, or never begun
                self._tracker.close(status, [], {})

    def _signals(self) -> StopSignal:
        return StopSignal(listens=self.hooks.interactive)

    def _progress(self) -> ProgressLine:
        return ProgressLine(self.config.run.num_learner_steps, draws=self.hooks.interactive)

    def _train(self, checkpoint: Path | None, stop: StopSignal, progress: ProgressLine) -> None:
        self.backend.start(checkpoint)
        stop.listen()
        if checkpoint is None:
            self._save()
        if self.hooks.figures:
            self._log(self.step, self.hooks.figures)
        trained, begun = self.backend.accounting.num_trained, time.monotonic()
        while (reason := self._stop_reason(stop) or self._limit()) is None:
            result = self.backend.step()
            if result is None:
                continue
            self.step = result.step
            speed = (self.backend.accounting.num_trained - trained) / (time.monotonic() - begun)
            recorded = self._record(result, speed) | self._collect_evaluation(wait=self.config.run.backend == "serial")
            progress.update(self.step, recorded)
            if self.step >= self._next_evaluation:
                self._start_evaluation()
            if time.monotonic() - self._last_save > self.config.run.save_every_seconds:
                self._save()
        self._reason = reason
        last = self.backend.drain()
        if last is not None:
            self.step = last.step
        self._collect_evaluation(wait=True)

    def _stop_reason(self, stop: StopSignal) -> str | None:
        return INTERRUPTED if stop.requested else self.hooks.stop_reason()

    def _limit(self) -> str | None:
        """What the run has reached that ends it, or None."""
        run, num_sampled = self.config.run, self.backend.accounting.num_sampled
        if self._met is not None:
            return self._met
        if self.step >= run.num_learner_steps:
            return f"run.num_learner_steps: all {run.num_learner_steps:,} are taken"
        if self._out_of_time():
            return f"run.max_seconds: {run.max_seconds} are over"
        if run.max_oracle_calls is not None and num_sampled >= run.max_oracle_calls:
            return f"run.max_oracle_calls: {num_sampled:,} sequences are scored"
        return None

    def _out_of_time(self) -> bool:
        limit = self.config.run.max_seconds
        return limit is not None and time.monotonic() - self._started > limit

    def _record(self, result: StepResult, speed: float) -> dict[str, float]:
        """Average metrics until the next record is due; returns what was recorded."""
        for name, value in result.metrics.items():
            self._sums.setdefault(name, []).append(value)
        if result.step < self._next_record:
            return {}
        self._next_record = result.step + self.config.tracking.log_every_steps
        accounting = self.backend.accounting
        means = {name: math.fsum(values) / len(values) for name, values in self._sums.items()}
        self._sums = {}
        record = means | accounting.take_lags() | accounting.counts() | {"trained_per_second": speed}
        self._log(result.step, record)
        return record

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        figures = finite(metrics)
        try:
            self.folder.append_metrics({"step": step, "wall_seconds": self._wall_seconds(), **figures})
        except OSError as error:
            logger.warning("metrics of step %d were not written (%s)", step, error)
        if self._tracker is not None:
            self._tracker.log(step, figures)

    def _wall_seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._started

    def _plan_evaluation(self) -> None:
        every = self.config.evaluation.every_steps
        self._next_evaluation = (self.step // every + 1) * every

    def _start_evaluation(self) -> None:
        """Evaluate in a thread, so that the actors are served meanwhile; not at all while the last one still runs."""
        self._plan_evaluation()
        if self._evaluation is None:
            weights, statistics = self.backend.evaluation_weights(), self.backend.statistics()
            self._evaluation = self._pool.submit(self._evaluate, weights, statistics)

    def _evaluate(self, weights: EvaluationWeights, statistics: dict[str, float]) -> tuple[int, dict[str, float]]:
        return weights.step, statistics | self.evaluator.interim(weights)

    def _collect_evaluation(self, *, wait: bool) -> dict[str, float]:
        if self._evaluation is None or not (wait or self._evaluation.done()):
            return {}
        evaluation, self._evaluation = self._evaluation, None
        try:
            step, metrics = evaluation.result()
        except (OracleError, ValueError) as error:
            logger.warning("no evaluation at this step: %s", error)
            return {}
        self._log(step, metrics)
        self._met = self.config.run.stop_when.reason(step, metrics)
        if self.hooks.on_evaluation is not None:
            self.hooks.on_evaluation(step, metrics, self._write)
        return metrics

    def _save(self) -> None:
        """Write a checkpoint; if that fails, the last one stays and the next interval tries again."""
        try:
            self._write()
        except OSError as error:
            logger.warning(
                "no checkpoint at step %d (%s); the last one is kept, and another try follows", self.step, error
            )

    def _write(self) -> Path:
        self._last_save = time.monotonic()
        return self.folder.checkpoints.write(self.step, self._write_checkpoint)

    def _write_checkpoint(self, folder: Path) -> dict[str, Any]:
        return {
            "backend": self.backend.save(folder),
            "step": self.step,
            "wall_seconds": self._wall_seconds(),
            "run_key": self._run_key,
        }

    def _finish(self, status: str, error: Exception | None) -> dict[str, Any]:
        """Save, judge and describe what was reached."""
        summary: dict[str, Any] = {
            "status": status,
            "error": None if error is None else str(error),
            "stop_reason": self._reason,
        }
        if status != FAILED:
            self._save()
            try:
                summary |= self._judge()
            except (OracleError, ValueError) as failure:
                logger.error("the sampler is saved, but could not be judged: %s", failure)
                summary |= {"status": FAILED, "error": str(failure)}
        summary |= self._counts()
        try:
            self.folder.write_summary(summary)
        except OSError as failure:
            logger.error("summary.json was not written (%s)", failure)
            summary |= {"status": FAILED, "error": str(failure)}
        try:
            from distributed.report import write_report

            write_report(self.folder)
        except (OSError, ValueError) as failure:
            logger.warning("report.html was not written (%s)", failure)
        if self._tracker is not None:
            newest = self.folder.checkpoints.newest_first()[:1]
            model = newest[0] if newest and self.config.tracking.log_model and summary["status"] != FAILED else None
            self._tracker.close(summary["status"], self._artifacts(), summary, model)
            self._tracker = None
        return summary

    def _counts(self) -> dict[str, Any]:
        """What was done, by whom, and how long it took."""
        accounting, wall = self.backend.accounting, self._wall_seconds()
        earlier = self.folder.read_summary().get("seeds")  # of the sessions before this one was resumed
        return accounting.counts() | {
            "num_trajectories": accounting.num_sampled,
            "trajectories_per_second": accounting.num_sampled / max(wall, 1e-9),
            "num_learner_steps": self.step,
            "wall_seconds": wall,
            "cpu_seconds": accounting.cpu_seconds,
            "seed": self.config.run.seed,
            "seeds": (earlier if isinstance(earlier, dict) else {}) | self.backend.seeds(),
            "git_commit": git_commit(),
        }

    def _judge(self) -> dict[str, float]:
        weights = self.backend.evaluation_weights()
        from distributed.report import draw_plots  # matplotlib takes longer to load than many a command takes

        judgement = judge(self.evaluator, weights)
        self._log(weights.step, judgement.metrics)
        try:
            draw_plots(self.folder, self.evaluator, judgement)
        except (OSError, ValueError) as error:
            logger.warning("plots were not written (%s)", error)
        return judgement.metrics

    def _artifacts(self) -> list[Path]:
        newest = self.folder.checkpoints.newest_first()[:1]
        folder = self.folder
        files = [folder.config_file, folder.summary_file, folder.report_file, folder.modes_file]
        files = [file for file in files if file.exists()] + sorted(folder.plots.glob("*.png"))
        return files + [checkpoint / LEARNER_FILE for checkpoint in newest]


def git_commit() -> str | None:
    """Commit of the program, or None outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"],  # noqa: S607 - whichever git the user has
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    top, _, commit = done.stdout.strip().partition("\n")
    return commit or None if top and Path(top).resolve() == root else None
