"""A sweep on Ray Tune: search, scheduler, interruption, and what became of every trial."""

import json
import logging
import math
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Repeater
from ray.tune.search.repeater import TRIAL_INDEX

from distributed import cli
from distributed.config import ConfigError, ExperimentConfig
from distributed.experiment import make_environment, make_learner
from distributed.reservation import bundles, cluster_has_gpu, connect_with_room
from distributed.run import prepare
from distributed.run_folder import RunFolder, finite
from distributed.search_space import Domain, applicable, dotted, on_steps
from distributed.sweep_config import Sweep, SweepConfig
from distributed.sweep_report import SweepProgress, TrialResult, best_figures, error_of, print_report, write_report
from distributed.tracking import SweepTracker
from distributed.training_loop import DONE, FAILED, INTERRUPTED, STOPPED
from distributed.trial import END_SECONDS, STEP, STOP_FILE, Trial, TrialSetup

logger = logging.getLogger(__name__)
TUNE_FOLDER, TRIALS_FOLDER = "tune", "trials"
TUNES_OWN = (
    "time", "pid", "done", "training_iteration", "iterations", "episodes", "trial", "date", "checkpoint", "should", "node",
    "hostname", "config", "experiment",
)  # fmt: skip
"""Beginnings of what Tune adds to a trial's figures."""
QUIET_CHECKS = 4
"""Half seconds in which no trial may be found at work after an interruption."""
CHECK_SAMPLES = 16
"""Samples with which an untrained sampler is judged, to see which figures there are."""


def find_metric(config: SweepConfig, experiment: ExperimentConfig) -> str:
    """The figure by which trials are compared; loads the oracle and judges an untrained sampler.

    Raises ConfigError if this experiment's evaluations do not give it.
    """
    learner_config = experiment.learner.model_copy(update={"device": "cpu"})
    evaluation = experiment.evaluation.model_copy(update={"num_samples": CHECK_SAMPLES})
    experiment = experiment.model_copy(update={"learner": learner_config, "evaluation": evaluation})
    evaluator = prepare(experiment, make_environment(experiment), resumed=False)
    try:
        weights = make_learner(experiment).evaluation_weights()
        interim = evaluator.interim(weights)
        final = interim | evaluator.sample_metrics(weights)[0]
    finally:
        evaluator.oracle.close()
    usual = ("excess_kl", "exact_kl", "validation_crps")
    metric = config.metric or next((name for name in usual if name in final), "sampled_reverse_kl")
    if metric not in final:
        raise ConfigError(f"sweep.metric: got {metric!r}; this experiment is judged by: {', '.join(sorted(final))}")
    if metric not in interim and config.scheduler.name != "fifo":
        raise ConfigError(
            f"sweep.metric: {metric} is known only at the end of a run; allowed with scheduler: {config.scheduler.name}: "
            f"{', '.join(sorted(interim)) or 'none with this oracle, so scheduler: fifo'}"
        )
    return metric


def run_sweep(sweep: Sweep, *, resumed: bool) -> int:
    """Run it to its end or to Ctrl-C, write the report, and print it; returns the exit code."""
    with RunFolder(sweep.folder).locked():
        own, room = connect_with_room(sweep)
        try:
            return _run_connected(sweep, room, resumed=resumed)
        finally:
            if own:
                ray.shutdown()


def _run_connected(sweep: Sweep, room: int, *, resumed: bool) -> int:
    experiment, folder = sweep.experiment, sweep.folder / TRIALS_FOLDER
    folder.mkdir(exist_ok=True)
    (folder / STOP_FILE).unlink(missing_ok=True)
    swept = {key: domain.model_dump(mode="json", exclude_unset=True) for key, domain in sweep.config.space.items()}
    parameters = experiment.model_dump(mode="json") | {"sweep": {k: json.dumps(v) for k, v in swept.items()}}
    tracker = SweepTracker(experiment, sweep.key, sweep.name, parameters)
    ended, statuses, points = FAILED, {}, []
    try:
        setup = TrialSetup(
            key=sweep.key,
            base=sweep.base,
            space=sweep.config.space,
            seeds=sweep.seeds,
            folder=folder,
            working_directory=sweep.working_directory,
            mlflow_uri=sweep.mlflow_uri,
            parent=tracker.run_id,
            metric=sweep.metric,
            mutates=sweep.config.scheduler.name == "pbt",
        )
        with _Interruption(folder / STOP_FILE) as stop:
            grid = _tuner(sweep, setup, room, resumed=resumed).fit()
        trials = grid._experiment_analysis.trials  # a Result of Tune's knows neither its trial's point nor its status
        results = [_result(sweep, trial, interrupted=stop.requested) for trial in trials]
        statuses = {setup.run_key(result.trial_id): result.status for result in results}
        points = write_report(sweep.folder, sweep.config, sweep.metric, sweep.base, results)
        print_report(points, sweep.config, sweep.metric, sweep.folder)
        failed = [result for result in results if result.status == FAILED]
        ended = INTERRUPTED if stop.requested else FAILED if len(failed) == len(results) else DONE
    except KeyboardInterrupt:
        ended = INTERRUPTED
        raise
    finally:
        figures = best_figures(points, sweep.metric) if points else {}
        tracker.close(ended, statuses, [f for f in sorted(sweep.folder.glob("*.*")) if f.is_file()], figures)
    if stop.requested:
        logger.warning("interrupted; go on with --resume %s", sweep.folder)
        return cli.EXIT_INTERRUPTED
    return cli.EXIT_FAILED if failed else cli.EXIT_DONE


class _Interruption:
    """Ctrl-C or SIGTERM: Tune saves what it knows, and the trials see the stop file, save and end."""

    def __init__(self, stop_file: Path):
        self.requested, self._stop_file = False, stop_file

    def __enter__(self) -> "_Interruption":
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # ours calls Tune's
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        self._before_tune = signal.getsignal(signal.SIGUSR1)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGUSR1, self._before_tune)
        self._stop_file.unlink(missing_ok=True)

    def _request(self, number: int, frame: FrameType | None) -> None:
        tune_stops = signal.getsignal(signal.SIGUSR1)
        if self.requested or tune_stops == self._before_tune or not callable(tune_stops):
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping the trials, which save; press Ctrl-C again to stop at once")
        self._stop_file.touch()
        self._wait_for_trials()  # Tune itself would wait for ten seconds
        tune_stops(signal.SIGUSR1, frame)

    def _wait_for_trials(self) -> None:
        """Until no trial has held its folder for a moment."""
        deadline, quiet = time.monotonic() + END_SECONDS, 0
        while quiet < QUIET_CHECKS and time.monotonic() < deadline:
            quiet = 0 if any(_is_locked(file.parent) for file in self._stop_file.parent.glob("*/lock")) else quiet + 1
            time.sleep(0.5)


def _is_locked(folder: Path) -> bool:
    try:
        with RunFolder(folder).locked():
            return False
    except ConfigError:
        return True


def _tuner(sweep: Sweep, setup: TrialSetup, room: int, *, resumed: bool) -> tune.Tuner:
    has_gpu = cluster_has_gpu()

    def reserve(point: dict[str, Any]) -> tune.PlacementGroupFactory:
        try:
            config = setup.config(point, "trial")
        except ConfigError:  # a search chose what is not valid: the trial will fail, not the sweep
            config = sweep.experiment
        return tune.PlacementGroupFactory(bundles(sweep.config, config, has_gpu), strategy="PACK")

    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the run folders hold the metrics
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # it prints to stdout
    for name in ("ray.tune.analysis.experiment_analysis", "ray.tune.execution.tune_controller", "ray.tune.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # `SweepProgress` says what failed
    np.random.seed(int(sweep.rng("mutations").integers(2**32)))
    random.seed(int(sweep.rng("mutations").integers(2**32)))  # which Tune's population-based training draws from
    trainable = tune.with_resources(tune.with_parameters(Trial, setup=setup), reserve)
    path = sweep.folder / TUNE_FOLDER
    if resumed and _has_state(path):
        return tune.Tuner.restore(str(path), trainable=trainable, resume_unfinished=True, resume_errored=True)
    settings = sweep.config
    shutil.rmtree(path, ignore_errors=True)  # it ended before it knew of any trial
    search, num_trials = _search(sweep, room)
    space = {key: _to_tune(domain) for key, domain in settings.space.items()}
    if settings.search == "random":
        space["run.seed"] = tune.choice(list(sweep.seeds))
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode=settings.mode,
            num_samples=num_trials,
            scheduler=_scheduler(sweep),
            search_alg=search,
            reuse_actors=True,
            trial_dirname_creator=_trial_id,
            trial_name_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(sweep.folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[SweepProgress(num_trials, sweep.metric, settings.mode)],
        ),
    )


def _has_state(path: Path) -> bool:
    """Whether Tune can go on from its folder: it makes one before it knows of any trial."""
    for file in path.glob("experiment_state-*.json"):
        try:
            json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        return tune.Tuner.can_restore(str(path))
    return False


def _trial_id(trial: Any) -> str:
    return trial.trial_id


def _to_tune(domain: Domain) -> Any:
    """The domain as Ray Tune's searches draw from it."""
    if domain.is_listed:
        return tune.choice(list(domain.values))
    return getattr(tune, domain.kind)(*domain.values)


def _search(sweep: Sweep, room: int) -> tuple[Any, int]:
    """Search algorithm and number of trials. Random points are drawn here, so that every one is known to be valid."""
    settings, seeds = sweep.config, sweep.seeds
    if settings.search == "random":
        trials = [point | {"run.seed": seed} for point in sweep.points for seed in seeds]
        generator = BasicVariantGenerator(points_to_evaluate=trials, max_concurrent=settings.max_concurrent or 0)
        return generator, len(trials)
    seed = int(sweep.rng("search").integers(2**31))
    if settings.search == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        searcher: Any = OptunaSearch(metric=sweep.metric, mode=settings.mode, seed=seed)
    else:
        from ray.tune.search.hyperopt import HyperOptSearch

        searcher = HyperOptSearch(metric=sweep.metric, mode=settings.mode, random_state_seed=seed)
    searcher = ConcurrencyLimiter(Repeater(searcher, repeat=len(seeds)), max_concurrent=settings.max_concurrent or room)
    return searcher, settings.num_samples * len(seeds)


def _scheduler(sweep: Sweep) -> TrialScheduler:
    settings, run = sweep.config.scheduler, sweep.experiment.run
    varies_length = "run.num_learner_steps" in sweep.config.space
    longest = max(sweep.config.space["run.num_learner_steps"].extremes if varies_length else (run.num_learner_steps,))
    grace = min(run.num_learner_steps, settings.grace_steps or sweep.experiment.evaluation.every_steps)
    if settings.name == "asha":
        return AsyncHyperBandScheduler(
            time_attr=STEP, max_t=longest, grace_period=grace, reduction_factor=settings.reduction_factor
        )
    if settings.name == "median":
        never = math.inf  # it would pause trials for others to catch up, at the cost of their actors
        return MedianStoppingRule(time_attr=STEP, grace_period=grace, min_time_slice=never)  # type: ignore[arg-type]
    if settings.name == "pbt":
        space = sweep.config.space
        return PopulationBasedTraining(
            time_attr=STEP,
            perturbation_interval=settings.perturbation_steps or max(1, run.num_learner_steps // 4),
            hyperparam_mutations={
                key: list(domain.values) if domain.is_listed else _to_tune(domain) for key, domain in space.items()
            },
            quantile_fraction=settings.quantile,
            custom_explore_fn=partial(on_steps, space),
            log_config=False,
        )
    return FIFOScheduler()


def _result(sweep: Sweep, trial: Any, *, interrupted: bool) -> TrialResult:
    """What became of a trial of Tune's, in its run's own words where it left any."""
    folder = RunFolder(sweep.folder / TRIALS_FOLDER / trial.trial_id)
    summary = folder.read_summary()
    point = on_steps(sweep.config.space, trial.config)
    if TRIAL_INDEX in point:
        point["run.seed"] = sweep.seeds[point.pop(TRIAL_INDEX)]
    if sweep.config.scheduler.name == "pbt" and folder.config_file.exists():
        used = dotted(folder.load_config([]).model_dump(mode="json"))
        point = {key: used[key] for key in point if key in used}
    point = applicable(sweep.base, sweep.config.space, point)
    last = trial.run_metadata.last_result  # `trial.last_result` may be that of the process's trial before
    figures = finite(summary or {name: value for name, value in last.items() if not name.startswith(TUNES_OWN)})
    if trial.status == trial.ERROR:
        return TrialResult(trial.trial_id, point, FAILED, figures, summary.get("error") or error_of(trial))
    status = summary.get("status", STOPPED)
    if trial.status != trial.TERMINATED:
        status = INTERRUPTED
    elif status == INTERRUPTED and not interrupted:
        status = STOPPED  # by the scheduler, at the moment when an earlier session was interrupted
    return TrialResult(trial.trial_id, point, status, figures, "")
