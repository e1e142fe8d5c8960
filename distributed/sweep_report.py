"""What a sweep leaves: a table of trials, the points over their seeds, a plot, the best point ready to run."""

import csv
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ray import tune
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from distributed.config import apply_values, validate
from distributed.progress import LINE_SECONDS, results_console, stderr
from distributed.ray_faults import last_line
from distributed.search_space import applicable
from distributed.sweep_config import SweepConfig
from distributed.sweep_plots import sweep_plot, text
from distributed.training_loop import FAILED

logger = logging.getLogger(__name__)
SHOWN_POINTS = 12


class TrialResult(NamedTuple):
    """How a trial ended."""

    trial_id: str
    point: dict[str, Any]
    """Varied keys and their values, run.seed among them."""
    status: str
    """done, stopped (early, by the scheduler), interrupted or failed."""
    metrics: dict[str, float]
    """Its final figures, or its last evaluation's."""
    error: str
    """Why it failed; otherwise empty."""


class PointResult(NamedTuple):
    """A point of the space, over its seeds."""

    point: dict[str, Any]
    value: float
    """Median of the sweep's metric over the seeds; NaN if no trial reported it."""
    values: list[float]
    statuses: list[str]


class SweepProgress(tune.Callback):
    """A bar with the best figure so far; on anything but a terminal, a line now and then."""

    def __init__(self, num_trials: int, metric: str, mode: str):
        self._given = (num_trials, metric, mode)
        self._ended: set[str] = set()
        self._last = 0.0

    def __getstate__(self) -> dict[str, Any]:  # Tune saves its callbacks, and a bar cannot be saved
        return {"_given": self._given, "_ended": set(), "_last": 0.0}

    def setup(self, *_: Any, **info: Any) -> None:
        """Called by Tune when it starts."""
        self._bar = Progress(
            SpinnerColumn(), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), console=stderr, refresh_per_second=2, disable=not stderr.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("trials", total=self._given[0], figures="starting")
        self._bar.start()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        """A trial was evaluated."""
        self._show(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended."""
        self._ended.add(trial.trial_id)
        self._show(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed."""
        logger.error("trial %s failed: %s", trial.trial_id, error_of(trial))
        self._ended.add(trial.trial_id)
        self._show(trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """All is over."""
        self._bar.stop()

    def _show(self, trials: list[Any]) -> None:
        total, metric, mode = self._given
        values = [trial.last_result[metric] for trial in trials if metric in (trial.last_result or {})]
        best = f"{metric} {(min if mode == 'min' else max)(values):.4g} at best" if values else ""
        ended = sum(trial.is_finished() for trial in trials if trial.trial_id not in self._ended) + len(self._ended)
        self._bar.update(self._task, completed=ended, figures=best)
        if not stderr.is_terminal and (time.monotonic() - self._last > LINE_SECONDS or ended == total):
            self._last = time.monotonic()
            logger.info("%d of %d trials ended%s", ended, total, f" · {best}" if best else "")


def error_of(trial: Any) -> str:
    """The line of a trial's error that names its cause."""
    try:
        return last_line(trial.get_error() or RuntimeError(Path(trial.error_file).read_text()))
    except (OSError, TypeError):  # on another host, or there is none
        return f"see {trial.error_file}"


def points_of(results: list[TrialResult], sweep: SweepConfig, metric: str, base: dict[str, Any]) -> list[PointResult]:
    """The points, best first, those last of which a trial failed; the median is over the others."""
    groups: dict[str, list[TrialResult]] = {}
    points: dict[str, dict[str, Any]] = {}
    for result in results:
        point = {key: result.point[key] for key in sweep.space if key in result.point}
        point = applicable(base, sweep.space, point)
        points[repr(point)] = point
        groups.setdefault(repr(point), []).append(result)
    rows = []
    for name, members in groups.items():
        values = [m.metrics[metric] for m in members if m.status != FAILED and metric in m.metrics]
        median = float(np.median(values)) if values else float("nan")
        rows.append(PointResult(points[name], median, values, [m.status for m in members]))
    sign = 1 if sweep.mode == "min" else -1
    return sorted(rows, key=lambda row: (len(row.values) < len(row.statuses), np.isnan(row.value), sign * row.value))


def write_report(
    folder: Path, sweep: SweepConfig, metric: str, base: dict[str, Any], results: list[TrialResult]
) -> list[PointResult]:
    """Write results.csv, points.csv, best.yaml and sweep.png; returns the points, best first."""
    points = points_of(results, sweep, metric, base)
    keys = list(sweep.space)
    _write_trials(folder / "results.csv", keys, results)
    with open(folder / "points.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, f"{metric}_median", f"{metric}_min", f"{metric}_max", "num_trials", "num_judged"])
        for point in points:
            figures = (point.value, min(point.values), max(point.values)) if point.values else ("", "", "")
            writer.writerow(
                [*(point.point.get(key, "") for key in keys), *figures, len(point.statuses), len(point.values)]
            )
    if points and points[0].values:
        best = validate(apply_values(base, points[0].point))
        header = (
            f"# The best point of a sweep: median {metric} {points[0].value:.6g} over {len(points[0].values)} trial(s), "
            f"with {', '.join(f'{key} {text(value)}' for key, value in points[0].point.items())}.\n"
        )
        (folder / "best.yaml").write_text(header + best.to_yaml())
        try:
            sweep_plot([(p.point, p.value) for p in points if p.values], sweep, metric, folder / "sweep.png")
        except (OSError, ValueError) as error:
            logger.warning("sweep.png was not drawn (%s)", error)
    return points


def _write_trials(path: Path, keys: list[str], results: list[TrialResult]) -> None:
    metrics = sorted({name for result in results for name in result.metrics})
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial_id", "status", "error", "run.seed", *keys, *metrics])
        for result in results:
            cells = [result.point.get(key, "") for key in ("run.seed", *keys)]
            figures = [result.metrics.get(name, "") for name in metrics]
            writer.writerow([result.trial_id, result.status, result.error, *cells, *figures])


def best_figures(points: list[PointResult], metric: str) -> dict[str, float]:
    """The best point's figure, for MLflow's parent run."""
    return {f"best_{metric}": points[0].value, "num_points": len(points)} if points and points[0].values else {}


def print_report(points: list[PointResult], sweep: SweepConfig, metric: str, folder: Path) -> None:
    """The best points, to stdout."""
    table = Table(title=f"{metric}, {'least' if sweep.mode == 'min' else 'most'} first: {len(points)} points")
    several = any(len(point.statuses) > 1 for point in points)
    columns = ("median", "min", "max") if several else (metric,)
    for name in (*sweep.space, *columns, "trials"):
        table.add_column(name, justify="right", overflow="fold")
    for point in points[:SHOWN_POINTS]:
        figures = (point.value, min(point.values), max(point.values)) if point.values else ()
        shown = [f"{value:.4g}" for value in figures[: len(columns)]] or ["–"] * len(columns)
        ended = ", ".join(f"{point.statuses.count(s)} {s}" for s in dict.fromkeys(point.statuses))
        table.add_row(*(text(point.point.get(key, "")) for key in sweep.space), *shown, ended)
    console = results_console()
    console.print(table)
    if len(points) > SHOWN_POINTS:
        console.print(f"and {len(points) - SHOWN_POINTS} more in points.csv")
    console.print(f"sweep folder: {folder}", soft_wrap=True)
