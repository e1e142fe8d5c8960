"""Compare runs:  python -m distributed.compare RUN… | --experiment NAME [--filter FILTER] [--metric NAME …] [--out DIR]

A RUN is a run or sweep folder, or the id or the name of a run in MLflow; a run that has children, as a sweep's, stands for
them.
Prints a table, best first by the first metric, and writes it as compare.csv, and the learning curves as compare.png. The
store, which is only read, is --tracking-uri, or where the given folders log to, or $MLFLOW_TRACKING_URI, or sqlite:///mlflow.db.
"""

import argparse
import csv
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from distributed import cli
from distributed.checkpoints import load_state
from distributed.config import ConfigError, ExperimentConfig
from distributed.mlflow_store import FINAL, PARENT_TAG, RUN_KEY_TAG, Curve, Store, age_of, number_of, tracking_uri
from distributed.plots import CURVES
from distributed.progress import configure_logging, results_console, stderr
from distributed.run_folder import RunFolder
from distributed.sweep_config import SWEEP_FILE, load_sweep
from learner.checkpoint import CheckpointError

if TYPE_CHECKING:
    from mlflow.entities import Run

logger = logging.getLogger(__name__)
DEFAULT_METRICS = ("excess_kl", "exact_tv", "sampled_reverse_kl", "mean_score", "top100_mean", "batch_score", "loss")
BESIDES = ("mean_score", "num_modes", "num_trajectories")
"""Shown in the table beside the chosen metrics."""
MORE_IS_BETTER = {
    "mean_score", "median_score", "q90_score", "top100_mean", "num_modes", "unique_fraction", "mean_hamming", "novelty",
    "exact_mean_score", "batch_score", "effective_sample_fraction", "trajectories_per_second", "trained_per_second",
    "learner_utilisation",
}  # fmt: skip
ZERO_IS_BEST = {"log_z_error"}
LOGARITHMIC = {"loss", "excess_kl", "sampled_reverse_kl"}
NOISE = ("run.name", "run.output_folder", "tracking.")
"""Parameters that the table leaves out, though they differ."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
MAX_PANELS, MAX_LEGEND, MAX_PARAMETERS = 4, 12, 8


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m distributed.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run or sweep folder, or id or name of a run in MLflow")
    parser.add_argument("--experiment", metavar="NAME", help="all runs of this MLflow experiment")
    parser.add_argument("--filter", help="with --experiment: MLflow's filter, as 'metrics.final_excess_kl < 0.1'")
    parser.add_argument("--metric", action="append", metavar="NAME", help="metric to compare; can be repeated")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow server or store")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="folder (default runs/comparison)")
    parser.add_argument("--limit", type=int, default=200, help="at most so many runs, the newest (default 200)")
    options = parser.parse_intermixed_args(arguments)
    configure_logging()
    if bool(options.runs) == (options.experiment is not None):
        raise ConfigError("give either runs, or --experiment with the name of one")
    if options.filter is not None and options.experiment is None:
        raise ConfigError("--filter goes with --experiment")
    if options.limit < 1:
        raise ConfigError(f"--limit: got {options.limit}; allowed: 1 or more")
    folders = {word: RunFolder(Path(word)) for word in options.runs}
    configs = {word: folder.load_config([]) for word, folder in folders.items() if folder.config_file.is_file()}
    configs |= {word: load_sweep(Path(word)).experiment for word in options.runs if (Path(word) / SWEEP_FILE).is_file()}
    store = Store(options.tracking_uri or _common_uri(list(configs.values())))
    if options.experiment is not None:
        runs = runs_of_experiment(store, options.experiment, options.filter or "")
    else:
        runs = [run for word in options.runs for run in runs_named(store, word, configs.get(word))]
    runs = _newest(runs, options.limit)
    metrics = choose_metrics(runs, options.metric or [])
    runs.sort(key=lambda run: badness(metrics[0], figure_of(run, metrics[0])))
    curves = read_curves(store, runs, metrics)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        write_csv(runs, metrics, options.out / "compare.csv")
        plot_curves(runs, metrics, curves, options.out / "compare.png")
    except OSError as error:
        raise ConfigError(f"--out: {options.out} cannot be written ({error})") from error
    _print(runs, metrics, options.out)
    return cli.EXIT_DONE


def _common_uri(configs: list[ExperimentConfig]) -> str:
    uris = sorted({tracking_uri(config) for config in configs or [ExperimentConfig()]})
    if len(uris) > 1:
        raise ConfigError(f"the runs are in several stores ({', '.join(uris)}); choose one with --tracking-uri")
    return uris[0]


def runs_named(store: Store, word: str, config: ExperimentConfig | None) -> "list[Run]":
    """The run that a word of the command line means (a folder, if it has a `config`), or its children; raises ConfigError."""
    if config is not None:
        experiment = store.experiments.get(config.tracking.experiment)
        found = store.search(f"tags.{RUN_KEY_TAG} = '{_run_key(word)}'", [experiment]) if experiment else []
        if not found:
            raise ConfigError(f"{word}: this run was not logged to MLflow at {store.uri}")
    else:
        quoted = f'"{word}"' if "'" in word else f"'{word}'"
        found = store.search(f"attributes.run_id = {quoted}") or store.search(f"attributes.run_name = {quoted}")
        if not found:
            raise ConfigError(f"{word}: neither a run folder, nor the id or name of a run in MLflow at {store.uri}")
    newest = found[0].info.run_id
    if len(found) > 1:
        logger.warning("%d runs are named %s; taking the newest, %s (name one by its id)", len(found), word, newest)
    return store.search(f"tags.`{PARENT_TAG}` = '{newest}'") or found[:1]


def _run_key(folder: str) -> str:
    if (Path(folder) / SWEEP_FILE).is_file():
        return load_sweep(Path(folder)).key
    for checkpoint in RunFolder(Path(folder)).checkpoints.newest_first():
        try:
            return str(load_state(checkpoint)["run_key"])
        except (CheckpointError, KeyError) as error:
            logger.warning("%s: %s; trying an older checkpoint", checkpoint, error)
    raise ConfigError(f"{folder}: no checkpoint tells which MLflow run it is; give that run's id or name")


def runs_of_experiment(store: Store, name: str, condition: str) -> "list[Run]":
    """Runs of an experiment that meet MLflow's filter, without parents of others; raises ConfigError if there are none."""
    if name not in store.experiments:
        known = ", ".join(sorted(store.experiments)) or "none"
        raise ConfigError(f"--experiment: MLflow at {store.uri} has no {name!r}; it has {known}")
    ids = [store.experiments[name]]
    found = store.search(condition, ids, option="--filter")
    children = store.search(f"tags.`{PARENT_TAG}` != ''", ids) if condition else found
    parents = {run.data.tags.get(PARENT_TAG) for run in children}
    runs = [run for run in found if run.info.run_id not in parents]
    if not runs:
        raise ConfigError(f"--experiment: {name!r} has no runs{' that pass --filter' if condition else ''}")
    return runs


def _newest(runs: "list[Run]", limit: int) -> "list[Run]":
    """Each run once, and at most `limit`."""
    distinct = sorted({run.info.run_id: run for run in runs}.values(), key=age_of)
    if len(distinct) > limit:
        logger.warning("%d runs; only the newest %d are compared (see --limit)", len(distinct), limit)
    return distinct[:limit]


def choose_metrics(runs: "Sequence[Run]", wanted: Sequence[str]) -> list[str]:
    """The wanted metrics, or else up to four that the runs have; raises ConfigError if no run has one."""
    there = {name.removeprefix(FINAL) for run in runs for name in run.data.metrics}
    if not there:
        raise ConfigError("the runs have no metrics yet")
    names = list(dict.fromkeys(name.removeprefix(FINAL) for name in wanted))
    for name in names:
        if name not in there:
            raise ConfigError(f"--metric: no run has {name!r}; there are {', '.join(sorted(there))}")
    return names or ([name for name in DEFAULT_METRICS if name in there] or sorted(there))[:MAX_PANELS]


def figure_of(run: "Run", metric: str) -> float | None:
    """The final value of a metric, or else the last one; None if there is none."""
    values = [run.data.metrics[key] for key in (FINAL + metric, metric) if key in run.data.metrics]
    return next((number_of(value) for value in values if not math.isnan(value)), None)


def badness(metric: str, value: float | None) -> tuple[bool, float]:
    """Sorts the best run first, and runs without the metric last."""
    if value is None:
        return True, 0.0
    return False, -value if metric in MORE_IS_BETTER else abs(value) if metric in ZERO_IS_BEST else value


def read_curves(store: Store, runs: "Sequence[Run]", metrics: Sequence[str]) -> dict[tuple[str, str], Curve]:
    """Learning curves by run id and metric, where there is one; a point, if a metric is logged only at the end."""
    pairs = [(run, name) for run in runs for name in metrics if {name, FINAL + name} & run.data.metrics.keys()]
    return {
        (run.info.run_id, name): store.curve(run.info.run_id, name if name in run.data.metrics else FINAL + name)
        for run, name in track(pairs, "reading MLflow", console=stderr, transient=True)
    }


def differing(runs: "Sequence[Run]") -> list[str]:
    """Parameters that have more than one value among the runs, or that some lack."""
    keys = sorted(set().union(*(run.data.params for run in runs)))
    return [key for key in keys if len({run.data.params.get(key) for run in runs}) > 1]


def labels_of(runs: "Sequence[Run]") -> list[str]:
    """Names, with the first digits of the id where several runs have one."""
    named = [(run.info.run_name or run.info.run_id, run.info.run_id[:8]) for run in runs]
    count = Counter(name for name, _ in named)
    return [name if count[name] == 1 else f"{name} ({digits})" for name, digits in named]


def write_csv(runs: "Sequence[Run]", metrics: Sequence[str], path: Path) -> None:
    """A line for each run: what it is, the parameters that differ, `metrics` and all final figures; raises OSError."""
    final = {name.removeprefix(FINAL) for run in runs for name in run.data.metrics if name.startswith(FINAL)}
    parameters, names = differing(runs), [*metrics, *sorted(final.difference(metrics))]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run_id", "name", "status", *parameters, *names])
        for run in runs:
            values = [_cell(run.data.params.get(key, "")) for key in parameters] + [
                figure_of(run, name) for name in names
            ]
            writer.writerow([run.info.run_id, _cell(run.info.run_name or ""), run.info.status, *values])


def _cell(text: str) -> str:
    """`text` from a store that others write to, so that no spreadsheet takes it for a formula."""
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(FORMULA_STARTS) else text
    return text


def plot_curves(
    runs: "Sequence[Run]", metrics: Sequence[str], curves: Mapping[tuple[str, str], Curve], path: Path
) -> None:
    """A panel for each metric; a few runs have a legend, more are coloured by their final values. Raises OSError."""
    columns = min(2, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(6.5 * columns, 4 * rows), layout="constrained")
    colours: list[Any] = [colormaps["tab20"](2 * index % 20 + index // 10) for index in range(len(runs))]
    for number, metric in enumerate(metrics, 1):
        axes = figure.add_subplot(rows, columns, number)
        lines = [curves.get((run.info.run_id, metric), (np.array([]), np.array([]))) for run in runs]
        logarithmic = metric in LOGARITHMIC and all((values > 0).all() for _, values in lines)
        if len(runs) > MAX_LEGEND:
            colours, scale = _shades([figure_of(run, metric) for run in runs], logarithmic)
            figure.colorbar(scale, ax=axes, label="final value")
        for (steps, values), colour in reversed(list(zip(lines, colours, strict=True))):  # the best one on top
            axes.plot(steps, values, color=colour, lw=1.2, marker="o" if len(steps) == 1 else None)
        axes.set(xlabel="learner step", yscale="log" if logarithmic else "linear")
        axes.set_title(CURVES.get(metric, metric), parse_math=False)
        axes.grid(alpha=0.3)
    if len(runs) <= MAX_LEGEND:
        handles = [Line2D([], [], color=colour) for colour in colours]
        labels = [label[:50] for label in labels_of(runs)]
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=2 * columns, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
    figure.savefig(path, dpi=110)


def _shades(values: Sequence[float | None], logarithmic: bool) -> tuple[list[Any], ScalarMappable]:
    """A colour for each value, grey where it is missing or infinite, and their scale."""
    finite = [value for value in values if value is not None and math.isfinite(value)] or [1.0]
    norm = LogNorm if logarithmic and min(finite) > 0 else Normalize
    scale, shades = norm(min(finite), max(finite)), colormaps["viridis"]
    colours = [shades(scale(value)) if value in finite else "lightgrey" for value in values]
    return colours, ScalarMappable(scale, shades)


def _print(runs: "Sequence[Run]", metrics: Sequence[str], folder: Path) -> None:
    """The table, to stdout."""
    parameters = [key for key in differing(runs) if not key.startswith(NOISE)]
    shown, names = parameters[:MAX_PARAMETERS], list(dict.fromkeys([*metrics, *BESIDES]))
    names = [name for name in names if any(figure_of(run, name) is not None for run in runs)]
    best = "most" if metrics[0] in MORE_IS_BETTER else "nearest to zero" if metrics[0] in ZERO_IS_BEST else "least"
    table = Table(title=escape(f"{best} {metrics[0]} first"))
    for name in ("run", "status", *shown, *names):
        table.add_column(escape(name), justify="left" if name in ("run", "status") else "right", overflow="fold")
    for run, label in zip(runs, labels_of(runs), strict=True):
        cells = [label, run.info.status, *(run.data.params.get(key, "–") for key in shown)]
        table.add_row(*(escape(cell) for cell in cells), *(_text(figure_of(run, name)) for name in names))
    console = results_console()
    console.print(table)
    if len(parameters) > len(shown):
        console.print(f"{len(parameters) - len(shown)} more parameters differ; compare.csv has them")
    console.print(escape(f"{folder}/compare.csv, compare.png"), soft_wrap=True)


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"


if __name__ == "__main__":
    cli.exit_with(main)
