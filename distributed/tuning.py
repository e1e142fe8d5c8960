"""A sweep on Ray Tune: search, scheduler, interruption, and what became of every trial."""

import json
import logging
import os
import random
import signal
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

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
from distributed.experiment import derive_seed, make_environment, make_learner
from distributed.mlflow_store import tracking_uri
from distributed.reservation import bundles, connect_with_room
from distributed.run import prepare
from distributed.run_folder import RunFolder, finite
from distributed.search_space import Domain, dotted, draw_points
from distributed.sweep_config import Sweep, SweepConfig
from distributed.sweep_report import SweepProgress, TrialResult, best_figures, error_of, print_report, write_report
from distributed.tracking import SweepTracker
from distributed.training_loop import DONE, FAILED, INTERRUPTED, STOPPED
from distributed.trial import STEP, STOP_FILE, Trial, TrialSetup

logger = logging.getLogger(__name__)
TUNE_FOLDER, TRIALS_FOLDER = "tune", "trials"
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
    metric = config.metric or next((name for name in ("excess_kl", "exact_kl") if name in final), "sampled_reverse_kl")
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
        own = connect_with_room(sweep.config, sweep.base)
        try:
            return _run_connected(sweep, resumed=resumed)
        finally:
            if own:
                ray.shutdown()


def _run_connected(sweep: Sweep, *, resumed: bool) -> int:
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
            working_directory=Path.cwd(),
            mlflow_uri=tracking_uri(experiment),
            parent=tracker.run_id,
            metric=sweep.metric,
            mutates=sweep.config.scheduler.name == "pbt",
        )
        with _Interruption(folder / STOP_FILE) as stop:
            grid = _tuner(sweep, setup, resumed=resumed).fit()
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
        tune_stops(signal.SIGUSR1, frame)


def _tuner(sweep: Sweep, setup: TrialSetup, *, resumed: bool) -> tune.Tuner:
    def reserve(point: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory(bundles(sweep.config, setup.config(point, "trial")), strategy="PACK")

    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the run folders hold the metrics
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # it prints to stdout
    for name in ("ray.tune.analysis.experiment_analysis", "ray.tune.execution.tune_controller", "ray.tune.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # `SweepProgress` says what failed
    random.seed(
        derive_seed(sweep.experiment.run.seed, "mutations")
    )  # which Tune's population-based training draws from
    trainable = tune.with_resources(tune.with_parameters(Trial, setup=setup), reserve)
    path = sweep.folder / TUNE_FOLDER
    if resumed and tune.Tuner.can_restore(str(path)):
        return tune.Tuner.restore(str(path), trainable=trainable, resume_unfinished=True, resume_errored=True)
    settings = sweep.config
    search, num_trials = _search(sweep)
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


def _trial_id(trial: Any) -> str:
    return trial.trial_id


def _to_tune(domain: Domain) -> Any:
    """The domain as Ray Tune's searches draw from it."""
    if domain.is_listed:
        return tune.choice(list(domain.values))
    return getattr(tune, domain.kind)(*domain.values)


def _search(sweep: Sweep) -> tuple[Any, int]:
    """Search algorithm and number of trials. Random points are drawn here, so that every one is known to be valid."""
    settings, seeds = sweep.config, sweep.seeds
    if settings.search == "random":
        points = draw_points(sweep.base, settings.space, settings.num_samples, sweep.rng("points"))
        trials = [point | {"run.seed": seed} for point in points for seed in seeds]
        generator = BasicVariantGenerator(points_to_evaluate=trials, max_concurrent=settings.max_concurrent or 0)
        return generator, len(trials)
    seed = int(sweep.rng("search").integers(2**31))
    if settings.search == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        searcher: Any = OptunaSearch(metric=sweep.metric, mode=settings.mode, seed=seed)
    else:
        from ray.tune.search.hyperopt import HyperOptSearch

        searcher = HyperOptSearch(metric=sweep.metric, mode=settings.mode, random_state_seed=seed)
    searcher = ConcurrencyLimiter(
        Repeater(searcher, repeat=len(seeds)), max_concurrent=settings.max_concurrent or max(len(seeds), 2)
    )
    return searcher, settings.num_samples * len(seeds)


def _scheduler(sweep: Sweep) -> TrialScheduler:
    settings, run = sweep.config.scheduler, sweep.experiment.run
    grace = min(run.num_learner_steps, settings.grace_steps or sweep.experiment.evaluation.every_steps)
    if settings.name == "asha":
        return AsyncHyperBandScheduler(
            time_attr=STEP, max_t=run.num_learner_steps, grace_period=grace, reduction_factor=settings.reduction_factor
        )
    if settings.name == "median":
        never = run.num_learner_steps  # it would pause trials for others to catch up, at the cost of their actors
        return MedianStoppingRule(time_attr=STEP, grace_period=grace, min_time_slice=never)
    if settings.name == "pbt":
        space = sweep.config.space
        return PopulationBasedTraining(
            time_attr=STEP,
            perturbation_interval=settings.perturbation_steps or max(1, run.num_learner_steps // 4),
            hyperparam_mutations={
                key: list(domain.values) if domain.is_listed else _to_tune(domain) for key, domain in space.items()
            },
            quantile_fraction=settings.quantile,
            custom_explore_fn=partial(_keep_inside, space),
            log_config=False,
        )
    return FIFOScheduler()


def _keep_inside(space: dict[str, Domain], point: dict[str, Any]) -> dict[str, Any]:
    """A changed point with every range's value back between its ends."""
    return point | {key: domain.round(point[key]) for key, domain in space.items() if not domain.is_listed}


def _result(sweep: Sweep, trial: Any, *, interrupted: bool) -> TrialResult:
    """What became of a trial of Tune's, in its run's own words where it left any."""
    folder = RunFolder(sweep.folder / TRIALS_FOLDER / trial.trial_id)
    summary = json.loads(folder.summary_file.read_text()) if folder.summary_file.exists() else {}
    point = dict(trial.config)
    if TRIAL_INDEX in point:
        point["run.seed"] = sweep.seeds[point.pop(TRIAL_INDEX)]
    if sweep.config.scheduler.name == "pbt" and folder.config_file.exists():
        used = dotted(folder.load_config([]).model_dump(mode="json"))
        point = {key: used[key] for key in point if key in used}
    last = trial.run_metadata.last_result  # `trial.last_result` may be that of the process's trial before
    if trial.status == trial.ERROR:
        return TrialResult(trial.trial_id, point, FAILED, finite(last), summary.get("error") or error_of(trial))
    status = summary.get("status", INTERRUPTED if interrupted else STOPPED)
    return TrialResult(trial.trial_id, point, status, finite(summary or last), "")
