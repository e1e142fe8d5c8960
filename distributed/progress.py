"""What a run shows while it goes on and at its end. Progress goes to stderr, results to stdout."""

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

logger = logging.getLogger(__name__)
stderr = Console(stderr=True)
LINE_SECONDS = 10.0
"""Interval of progress lines where there is no terminal to draw on."""

SHOWN = (
    ("trained_per_second", "{:,.0f} traj/s"),
    ("loss", "loss {:.3g}"),
    ("dynamics_ce", "dynamics CE {:.3f}"),
    ("nelbo", "NELBO {:.3f}"),
    ("path_kl", "path KL {:.2f}"),
    ("batch_score", "score {:.3f}"),
    ("excess_kl", "excess KL {:.3f}"),
    ("validation_crps", "validation CRPS {:.4g}"),
    ("sampled_reverse_kl", "KL {:.3f}"),
    ("policy_lag", "lag {:.1f}"),
)
"""The figures on the progress line, in order."""

SUMMARY_ROWS = (
    ("exact_tv", "exact total variation to the target", "{:.4f}"),
    ("exact_kl", "exact KL(target ‖ sampler) [nats]", "{:.4f}"),
    ("kl_floor", "  of which no policy can avoid (noise)", "{:.4f}"),
    ("excess_kl", "  excess KL", "{:.4f}"),
    ("exact_nll", "exact NLL of the data [nats]", "{:.4f}"),
    ("pretrained_nll", "  of the pretrained model", "{:.4f}"),
    ("exact_nelbo", "exact NELBO of the data [nats]", "{:.4f}"),
    ("pretrained_nelbo", "NELBO of the data, pretrained model [nats]", "{:.3f}"),
    ("data_entropy", "  entropy of the data [nats]", "{:.3f}"),
    ("objective_j", "E[score] − α · path KL", "{:.4f}"),
    ("objective_j_star", "  the most that is possible", "{:.4f}"),
    ("path_kl", "path KL to the pretrained model [nats]", "{:.3f}"),
    ("frontier_score", "best mean score at that KL", "{:.4f}"),
    ("entropy", "entropy [nats]", "{:.3f}"),
    ("exact_mean_score", "exact mean score", "{:.4f}"),
    ("target_mean_score", "  of the target", "{:.4f}"),
    ("sampled_tv", "total variation, from samples", "{:.4f}"),
    ("sampled_reverse_kl", "KL(sampler ‖ target), from samples [nats]", "{:.4f}"),
    ("effective_sample_fraction", "  effective share of the samples", "{:.4f}"),
    ("target_mean_score_estimate", "mean score of the target, from samples", "{:.4f}"),
    ("kmer_tv", "total variation of the k-mers", "{:.4f}"),
    ("dynamics_tv", "dynamics model: mean TV to the true kernel", "{:.4f}"),
    ("mean_score", "mean score of samples", "{:.4f}"),
    ("top100_mean", "mean of the top 100", "{:.4f}"),
    ("kmer_correlation", "correlation of k-mers with the data", "{:.4f}"),
    ("gc_rmse", "GC content: RMS distance to its target", "{:.4f}"),
    ("reward_gap", "predicted less true score", "{:.4f}"),
    ("likelihood_z", "log-likelihood: z beside the data's", "{:.2f}"),
    ("true_log_prob_z", "  under the data's true law", "{:.2f}"),
    ("any_violated", "share that breaks a rule", "{:.4f}"),
    ("validation_crps", "CRPS on validation rows", "{:.4g}"),
    ("validation_coverage_90", "coverage of the 90% interval there", "{:.3f}"),
    ("binning_error_test", "round-trip error of the bins (normalised)", "{:.4f}"),
    ("beyond_bins_test", "share of test values beyond the bins", "{:.4f}"),
    ("num_test_origins", "test origins", "{:,.0f}"),
    ("num_modes", "modes", "{:,.0f}"),
    ("unique_fraction", "unique fraction", "{:.4f}"),
    ("num_trajectories", "trajectories sampled", "{:,.0f}"),
    ("num_dropped", "  of which dropped", "{:,.0f}"),
    ("num_learner_steps", "learner steps", "{:,.0f}"),
    ("trajectories_per_second", "trajectories per second", "{:,.0f}"),
    ("num_restarts", "actors restarted", "{:,.0f}"),
    ("wall_seconds", "wall seconds", "{:.1f}"),
    ("cpu_seconds", "CPU seconds", "{:.1f}"),
)


def configure_logging(verbose: bool = False) -> None:
    """Log to stderr, above the progress bar."""
    handler: logging.Handler = logging.StreamHandler()
    form = "%(asctime)s %(levelname)s %(message)s"
    if stderr.is_terminal:
        handler, form = RichHandler(console=stderr, show_path=False), "%(message)s"
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format=form, handlers=[handler], force=True)
    for name in ("matplotlib", "alembic", "mlflow", "urllib3", "git", "filelock", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)


class ProgressLine:
    """A bar with the newest figures; on anything but a terminal, or unless it `draws`, a line every few seconds."""

    def __init__(self, total_steps: int, *, draws: bool = True):
        self._draws = draws and stderr.is_terminal
        self._figures: dict[str, float] = {}
        self._last_line = time.monotonic()
        self._bar = Progress(
            SpinnerColumn(), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), console=stderr, refresh_per_second=4, disable=not self._draws,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=total_steps, figures="starting the actors")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, step: int, figures: dict[str, float]) -> None:
        """Show `step` and the newest of the figures."""
        self._figures |= figures
        shown = " · ".join(form.format(self._figures[name]) for name, form in SHOWN if name in self._figures)
        self._bar.update(self._task, completed=step, figures=shown)
        if not self._draws and time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            logger.info("step %d · %s", step, shown)


def results_console(width: int = 160) -> Console:
    """Stdout for wide tables, which are `width` columns wide where there is no terminal to say."""
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = width
    return console


BASELINES = ("naive", "seasonal_naive", "ets")
"""What forecasts are compared with; their figures end in `_` and this name."""
FORECAST_FIGURES = ("mae", "rmse", "mase", "crps", "coverage_90")


def compare_forecasts(metrics: Mapping[str, Any]) -> tuple[tuple[str, ...], list[list[str]], str]:
    """Header and rows of a table of a forecasting model beside the baselines, and in words whether it is worth having."""
    scores = {name: metrics[f"crps_{name}"] for name in BASELINES if metrics.get(f"crps_{name}") is not None}
    rows = [
        [name, *(f"{metrics[key + suffix]:.4g}" for key in FORECAST_FIGURES)]
        for name, suffix in (("model", ""), *((name, f"_{name}") for name in scores))
    ]
    ours, theirs = metrics["crps"], scores["seasonal_naive"]
    verdict = f"CRPS {1 - ours / theirs:.1%} below seasonal naive"
    if ours >= theirs:
        verdict = f"this model LOSES to seasonal naive: CRPS {ours:.4g} against {theirs:.4g}"
    best = min(scores, key=lambda name: scores[name])
    if scores[best] < ours and best != "seasonal_naive":
        verdict += f"; {best} is better still: {scores[best]:.4g}"
    return ("test rows", *FORECAST_FIGURES), rows, verdict


def print_summary(summary: dict[str, Any], title: str, folder: str | None = None) -> None:
    """The final table and the run folder, to stdout."""
    table = Table(title=title, show_header=False)
    for name, label, form in SUMMARY_ROWS:
        if summary.get(name) is not None:
            table.add_row(escape(label), form.format(summary[name]), name)
    console = Console()
    console.print(table)
    if summary.get("crps") is not None:
        header, rows, verdict = compare_forecasts(summary)
        comparison = Table(*header, title="rolling origin")
        for row in rows:
            comparison.add_row(*row)
        console.print(comparison)
        console.print(verdict, soft_wrap=True)
    if folder is not None:
        console.print(f"run folder: {folder}", soft_wrap=True)
