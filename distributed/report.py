"""What a run leaves for people to look at: plots, its best modes as modes.csv, and report.html with all of it in one file.

The report needs nothing but itself: pictures are part of it, and it links to nothing.
"""

import base64
import csv
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from distributed import plots
from distributed.evaluation import EvaluatedSamples, ExactLaw
from distributed.families import AnyEvaluator, Judgement
from distributed.progress import SUMMARY_ROWS, compare_forecasts
from distributed.run_folder import RunFolder, replace_text
from distributed.yaml_text import read_limited
from learner.metrics import find_modes

logger = logging.getLogger(__name__)
MAX_MODES = 100
"""Modes listed in modes.csv."""
SHOWN_MODES, NUM_LOGOS = 20, 3
"""Modes listed in the report, and those whose neighbourhood is drawn as a logo."""
MAX_TEXT_BYTES = 1_000_000
FORECASTS, DESIGNS = "Is it better than a simple forecast?", "What does it make?"
PICTURES = {
    "Is it close to its target?": ("probability_scatter", "score_histogram", "kmer_scatter", "frontier"),
    FORECASTS: ("forecast",),
    DESIGNS: ("mode_logo", "distances"),
    "How did training go?": ("learning_curves",),
}
"""Sections of the report, and the plots in each."""
CAPTIONS = {
    "probability_scatter": "Learned against target probability of every sequence; on the line they are equal.",
    "score_histogram": "Scores of samples, and the target's, where it is known.",
    "kmer_scatter": "Frequencies of k-mers in the samples, against the target's by importance weights.",
    "frontier": "The best mean score at each distance from the pretrained model, and this generator.",
    "forecast": "The last test origin: its window, the intervals of the sampled paths, some of them, and what came.",
    "mode_logo": "Information at each position: of the modes, and of the samples around each of the best.",
    "distances": "Diversity: letters in which pairs of samples, and of the best 100, differ.",
    "learning_curves": "Figures over learner steps; policy lag is the age, in versions, of the weights that drew a batch.",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } td, th { padding: .15rem 1rem .15rem 0; text-align: left; vertical-align: top;
         white-space: pre-wrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; } figure { margin: 1rem 0; } img { max-width: 100%; }
figcaption, .quiet { color: #555; } .failed { color: #b00020; }
"""


def draw_plots(folder: RunFolder, evaluator: AnyEvaluator, judgement: Judgement) -> None:
    """Draw everything there is to see of a generator, and list the modes; raises OSError or ValueError."""
    plots.learning_curves(folder.read_metrics(), folder.plots / "learning_curves.png")
    evaluator.draw_plots(folder.plots, judgement.law)
    if judgement.samples is not None:
        _draw_samples(folder, evaluator, judgement.law, judgement.samples)


def _draw_samples(
    folder: RunFolder, evaluator: AnyEvaluator, law: ExactLaw | None, evaluated: EvaluatedSamples
) -> None:
    path, samples = folder.plots, evaluated.trajectories
    plots.score_histogram(samples.scores, evaluated.target_weights, law, path / "score_histogram.png")
    if law is not None:
        plots.probability_scatter(law, path / "probability_scatter.png")
    if evaluated.kmers is not None:
        plots.kmer_scatter(evaluated.kmers, path / "kmer_scatter.png")
    environment = evaluator.environment
    lengths = environment.lengths(samples.tokens, samples.num_steps)
    tokens = environment.as_actions(samples.tokens, lengths)  # as `num_modes` compares them
    plots.distances(tokens, samples.scores, path / "distances.png")
    sequences = environment.sequences(samples.tokens, lengths).astype(str)
    _write_modes(folder, evaluator, tokens, sequences, samples.scores)


def _write_modes(
    folder: RunFolder, evaluator: AnyEvaluator, tokens: np.ndarray, sequences: np.ndarray, scores: np.ndarray
) -> None:
    """Logos and modes.csv: of `tokens` int [n, T], the same as texts [n], and their scores [n]."""
    evaluation, alphabet = evaluator.config.evaluation, evaluator.environment.config.alphabet
    modes = find_modes(tokens, scores, cutoff=evaluation.mode_cutoff, distance=evaluation.mode_distance)
    best = modes[:MAX_MODES]
    near = [(tokens != tokens[mode]).sum(1) <= evaluation.mode_distance for mode in best]
    if len(modes):
        groups = {"all modes": tokens[modes]}
        for number, sequence in enumerate(sequences[best[:NUM_LOGOS]]):
            groups[f"{number + 1}: in or near {sequence[:24]}{'…' * (len(sequence) > 24)}"] = tokens[near[number]]
        plots.logos(groups, alphabet, folder.plots / "mode_logo.png")
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["sequence", "score", "num_samples"])
    rows.writerows(
        [sequence, f"{score:.6g}", near_it.sum()]
        for sequence, score, near_it in zip(sequences[best], scores[best], near, strict=True)
    )
    replace_text(folder.modes_file, table.getvalue())


def write_report(folder: RunFolder) -> None:
    """Write report.html from what is in the run folder; raises OSError or ValueError."""
    replace_text(folder.report_file, "\n".join(_page(folder)) + "\n")


def _page(folder: RunFolder) -> Iterator[str]:
    summary = folder.read_summary()
    title = escape(folder.path.name)
    yield f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
    yield f'<p class="quiet">{escape(_ended(summary))}</p>'
    if summary.get("error"):
        yield f'<p class="failed">{escape(str(summary["error"]))}</p>'
    yield "<h2>Summary</h2>"
    rows = [(label, form.format(summary[n]), n) for n, label, form in SUMMARY_ROWS if summary.get(n) is not None]
    yield _table(("", "", "name in MLflow and metrics.jsonl"), rows)
    tables = {FORECASTS: _comparison(summary), DESIGNS: _best_modes(folder)}
    for heading, names in PICTURES.items():
        parts = [*_figures(folder, names), *tables.get(heading, ())]
        if parts:
            yield "\n".join([f"<h2>{escape(heading)}</h2>", *parts])
    yield f"<h2>Configuration</h2><pre>{escape(read_limited(folder.config_file, MAX_TEXT_BYTES))}</pre></body></html>"


def _ended(summary: dict[str, object]) -> str:
    parts = [summary.get("status"), summary.get("stop_reason"), f"seed {summary.get('seed')}"]
    commit = summary.get("git_commit")
    return " · ".join(str(part) for part in [*parts, f"commit {str(commit)[:10]}" if commit else None] if part)


def _figures(folder: RunFolder, names: tuple[str, ...]) -> Iterator[str]:
    """Those of the pictures `names` that the run has."""
    for name in names:
        file, caption = folder.plots / f"{name}.png", escape(CAPTIONS[name])
        if file.is_file():
            picture = base64.b64encode(file.read_bytes()).decode()
            yield f'<figure><img alt="{caption}" src="data:image/png;base64,{picture}">'
            yield f"<figcaption>{caption}</figcaption></figure>"


def _comparison(summary: dict[str, Any]) -> Iterator[str]:
    """Of forecasts."""
    if summary.get("crps") is not None:
        header, rows, verdict = compare_forecasts(summary)
        yield f"<p>{escape(verdict)}</p>"
        yield _table(header, rows)


def _best_modes(folder: RunFolder) -> Iterator[str]:
    if not folder.modes_file.is_file():
        return
    modes = list(csv.reader(read_limited(folder.modes_file, MAX_TEXT_BYTES).splitlines()))[1:]
    if modes:
        yield f"<p>The best modes; <code>{folder.modes_file.name}</code> lists more.</p>"
        yield _table(("sequence", "score", "samples in or near it"), modes[:SHOWN_MODES])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Names at the left, numbers at the right of their columns."""
    lines = ["<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td{_kind(cell)}>{escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _kind(cell: str) -> str:
    return ' class="number"' if cell[:1].isdigit() or cell[:1] == "-" else ""
