"""What a run leaves for people to look at: plots, its best modes as modes.csv, and report.html with all of it in one file.

The report needs nothing but itself: pictures are part of it, and it links to nothing.
"""

import base64
import csv
import io
import logging
from collections.abc import Iterator
from html import escape

from distributed import plots
from distributed.config import read_limited
from distributed.evaluation import EvaluatedSamples, ExactLaw
from distributed.families import AnyEvaluator
from distributed.progress import SUMMARY_ROWS
from distributed.run_folder import RunFolder, replace_text
from learner.metrics import find_modes

logger = logging.getLogger(__name__)
MAX_MODES = 100
"""Modes listed in modes.csv."""
SHOWN_MODES = 20
"""Modes listed in the report."""
MAX_TEXT_BYTES = 1_000_000
PICTURES = {
    "Is it close to its target?": ("probability_scatter", "score_histogram", "kmer_scatter", "frontier"),
    "What does it make?": ("mode_logo", "distances"),
    "How did training go?": ("learning_curves",),
}
"""Sections of the report, and the plots in each."""
CAPTIONS = {
    "probability_scatter": "Learned against target probability of every sequence; on the line they are equal.",
    "score_histogram": "Scores of samples, and the target's, where it is known.",
    "kmer_scatter": "Frequencies of k-mers in the samples, against the target's by importance weights.",
    "frontier": "The best mean score at each distance from the pretrained model, and this generator.",
    "mode_logo": "The modes: information at each position.",
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


def draw_plots(folder: RunFolder, evaluator: AnyEvaluator, law: ExactLaw | None, evaluated: EvaluatedSamples) -> None:
    """Draw everything there is to see of samples and of the exact law, and list the modes; raises OSError or ValueError."""
    path, evaluation, samples = folder.plots, evaluator.config.evaluation, evaluated.trajectories
    plots.learning_curves(folder.read_metrics(), path / "learning_curves.png")
    plots.score_histogram(samples.scores, evaluated.target_weights, law, path / "score_histogram.png")
    if law is not None:
        plots.probability_scatter(law, path / "probability_scatter.png")
    if evaluated.kmers is not None:
        plots.kmer_scatter(evaluated.kmers, path / "kmer_scatter.png")
    evaluator.draw_plots(path, law)
    environment = evaluator.environment
    lengths = environment.lengths(samples.tokens, samples.num_steps)
    tokens = environment.as_actions(samples.tokens, lengths)  # as `num_modes` compares them
    plots.distances(tokens, samples.scores, path / "distances.png")
    modes = find_modes(tokens, samples.scores, cutoff=evaluation.mode_cutoff, distance=evaluation.mode_distance)
    if len(modes):
        plots.mode_logo(tokens[modes], environment.config.alphabet, path / "mode_logo.png")
    best = modes[:MAX_MODES]
    near = [int(((tokens != tokens[mode]).sum(1) <= evaluation.mode_distance).sum()) for mode in best]
    sequences = environment.sequences(samples.tokens[best], lengths[best]).tolist()
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["sequence", "score", "num_samples"])
    for sequence, score, count in zip(sequences, samples.scores[best], near, strict=True):
        rows.writerow([sequence.decode("ascii"), f"{score:.6g}", count])
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
    for heading, names in PICTURES.items():
        present = [name for name in names if (folder.plots / f"{name}.png").is_file()]
        modes = list(_modes(folder)) if heading == "What does it make?" else []
        if present or modes:
            yield f"<h2>{escape(heading)}</h2>"
        for name in present:
            picture = base64.b64encode((folder.plots / f"{name}.png").read_bytes()).decode()
            caption = escape(CAPTIONS[name])
            yield f'<figure><img alt="{caption}" src="data:image/png;base64,{picture}">'
            yield f"<figcaption>{caption}</figcaption></figure>"
        if modes:
            yield f"<p>The best modes; <code>{folder.modes_file.name}</code> lists more.</p>"
            yield _table(("sequence", "score", "samples in or near it"), modes[:SHOWN_MODES])
    yield f"<h2>Configuration</h2><pre>{escape(read_limited(folder.config_file, MAX_TEXT_BYTES))}</pre></body></html>"


def _ended(summary: dict[str, object]) -> str:
    parts = [summary.get("status"), summary.get("stop_reason"), f"seed {summary.get('seed')}"]
    commit = summary.get("git_commit")
    return " · ".join(str(part) for part in [*parts, f"commit {str(commit)[:10]}" if commit else None] if part)


def _modes(folder: RunFolder) -> Iterator[list[str]]:
    if folder.modes_file.is_file():
        yield from list(csv.reader(read_limited(folder.modes_file, MAX_TEXT_BYTES).splitlines()))[1:]


def _table(header: tuple[str, ...], rows: list) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>"]
    for first, second, third in rows:
        cells = f'<td>{escape(first)}</td><td class="number">{escape(second)}</td><td><code>{escape(third)}</code></td>'
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])
