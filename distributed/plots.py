"""Plots of a run, as PNG files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from distributed.comparison import Summary
from distributed.evaluation import ExactLaw
from distributed.forecast_evaluation import Forecast

LETTER_COLOURS = {"A": "tab:green", "C": "tab:blue", "G": "orange", "T": "tab:red", "U": "tab:red"}
NUM_BEST, MAX_PAIRED = 100, 512
"""Samples whose pairwise distances are shown."""
CURVES = {
    "loss": "balance loss",
    "dynamics_ce": "dynamics cross-entropy [nats]",
    "excess_kl": "excess KL to the target [nats]",
    "exact_tv": "exact total variation",
    "sampled_tv": "total variation, from samples",
    "sampled_reverse_kl": "KL to the target, from samples [nats]",
    "entropy_ratio": "entropy ratio",
    "nelbo": "NELBO [nats]",
    "exact_nll": "exact negative log-likelihood of the data [nats]",
    "objective_j": "E[score] − α · path KL",
    "path_kl": "KL of the paths to the pretrained model [nats]",
    "reward_model_loss": "loss of the reward model",
    "kmer_correlation": "correlation of k-mers with the data",
    "future_ce": "cross-entropy of the true futures [nats]",
    "validation_crps": "CRPS on validation rows",
    "validation_coverage_90": "coverage of the 90% interval, validation rows",
    "batch_score": "mean score",
    "policy_lag": "policy lag [versions]",
}


def learning_curves(records: Iterable[dict[str, Any]], path: Path) -> None:
    """One panel for each of `CURVES` that was recorded, over learner steps."""
    records = list(records)
    names = [name for name in CURVES if any(name in record for record in records)]
    if not names:
        return
    figure = Figure(figsize=(12, 3.2 * ((len(names) + 2) // 3)), layout="constrained")
    for number, name in enumerate(names, 1):
        axes = figure.add_subplot((len(names) + 2) // 3, 3, number)
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), lw=1.2)
        axes.set(xlabel="learner step", title=CURVES[name])
        if name in ("loss", "excess_kl", "sampled_reverse_kl") and all(value > 0 for _, value in points):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def probability_scatter(law: ExactLaw, path: Path) -> None:
    """Learned against target probability of every sequence, as a density."""
    shown = law.target > 0
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.add_subplot()
    x, y = np.log10(law.target[shown]), np.log10(np.maximum(law.law[shown], 1e-300))
    image = axes.hexbin(x, y, gridsize=70, bins="log", mincnt=1, cmap="viridis")
    ends = [max(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color="tab:red", lw=1, label="perfect sampler")
    axes.set(xlabel="log10 target probability", ylabel="log10 learned probability", title="every sequence of the space")
    axes.legend()
    figure.colorbar(image, label="sequences")
    figure.savefig(path, dpi=110)


def frontier(best: Sequence[tuple[float, float]], reached: tuple[float, float], path: Path) -> None:
    """The largest mean score at each path KL, (KL [nats], score) points, and the one that was reached."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*sorted(best), strict=True), lw=1.5, label="best possible")
    axes.plot(*reached, "o", color="tab:red", label="generator")
    axes.set(xlabel="KL of the paths to the pretrained model [nats]", ylabel="mean score")
    axes.set_xlim(0, max(1.0, 1.5 * reached[0]))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def score_histogram(scores: np.ndarray, target_weights: np.ndarray | None, law: ExactLaw | None, path: Path) -> None:
    """Scores of samples, beside the target's and the sampler's exact distribution of scores where known.

    `target_weights` float [n]: else, shares under which the samples count as the target's.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    known = scores if law is None else np.concatenate([scores, law.scores[np.isfinite(law.scores)]])
    edges = np.linspace(known.min(), max(known.max(), known.min() + 1e-3), 41)
    axes.hist(scores, list(edges), density=True, alpha=0.5, label=f"{len(scores):,} samples")
    if law is not None:
        valid = np.isfinite(law.scores)
        for values, label in ((law.target, "target"), (law.law, "sampler, exact")):
            density, _ = np.histogram(law.scores[valid], edges, weights=values[valid], density=True)
            axes.stairs(density, edges, label=label, lw=1.5)
    if target_weights is not None:
        density, _ = np.histogram(scores, edges, weights=target_weights, density=True)
        axes.stairs(density, edges, label="target, by importance weights", lw=1.5)
    axes.set(xlabel="score", ylabel="density")
    axes.legend()
    figure.savefig(path, dpi=110)


def kmer_scatter(kmers: tuple[np.ndarray, np.ndarray], path: Path) -> None:
    """Frequency of each k-mer in the samples against the target's, as importance weights estimate it."""
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    ours, target = kmers
    axes.scatter(target, ours, s=14, alpha=0.7)
    top = float(max(ours.max(), target.max()))
    axes.plot([0, top], [0, top], color="tab:red", lw=1, label="perfect sampler")
    axes.set(xlabel="target, by importance weights", ylabel="samples", title=f"frequencies of {len(ours):,} k-mers")
    axes.legend()
    figure.savefig(path, dpi=110)


def logos(groups: Mapping[str, np.ndarray], alphabet: str, path: Path) -> None:
    """Sequence logos (information content in bits) of groups int [m, T], by title; end tokens are left out."""
    length = next(iter(groups.values())).shape[1]
    width = max(4, 0.45 * length + 1)
    num_columns = 2 if width < 7 and len(groups) > 1 else 1
    shape = (-(-len(groups) // num_columns), num_columns)
    figure = Figure(figsize=(width * shape[1], 2.4 * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False).ravel()
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    for axes, (title, tokens) in zip(panels, groups.items(), strict=False):
        _draw_logo(axes, information(tokens, len(alphabet)), alphabet)
        axes.set(xlabel="position", ylabel="bits", xlim=(0.4, length + 0.6), ylim=(0, np.log2(len(alphabet))))
        axes.set_title(f"{title} ({len(tokens)})", fontsize=10)
    figure.savefig(path, dpi=110)


def information(tokens: np.ndarray, num_letters: int) -> np.ndarray:
    """float64 [T, A]: share of each letter × information at its place [bits], of `tokens` int [m, T] and one count more each."""
    counts = np.stack([(tokens == letter).sum(0) for letter in range(num_letters)], 1) + 1.0
    shares = counts / counts.sum(1, keepdims=True)
    return shares * (shares * np.log2(shares * num_letters)).sum(1, keepdims=True)


def _draw_logo(axes: Axes, bits: np.ndarray, alphabet: str) -> None:
    glyphs = {letter: TextPath((0, 0), letter, prop=FontProperties(weight="bold")) for letter in alphabet}
    boxes = {letter: glyph.get_extents() for letter, glyph in glyphs.items()}
    colours = {letter: LETTER_COLOURS.get(letter, f"C{number}") for number, letter in enumerate(alphabet)}
    drawn = []
    for place, heights in enumerate(bits, 1):
        bottom = 0.0
        for letter, height in sorted(zip(alphabet, heights, strict=True), key=lambda pair: pair[1]):
            box = boxes[letter]
            stretch = Affine2D().translate(-box.x0, -box.y0).scale(0.9 / box.width, height / box.height)
            drawn.append((stretch.translate(place - 0.45, bottom).transform_path(glyphs[letter]), colours[letter]))
            bottom += height
    letters = PathCollection([path for path, _ in drawn], facecolors=[colour for _, colour in drawn], linewidths=0)
    letters.set_in_layout(False)  # their extents need not be known to arrange the panels, and take long
    axes.add_collection(letters, autolim=False)


def distances(tokens: np.ndarray, scores: np.ndarray, path: Path) -> None:
    """Shares of pairs, of samples `tokens` int [n, T] (of many, the first) and of the best by `scores` [n], at each distance."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    best = tokens[np.argsort(-scores, kind="stable")[:NUM_BEST]]
    for rows, label in ((tokens[:MAX_PAIRED], "samples"), (best, f"best {len(best)}")):
        found = np.zeros(tokens.shape[1] + 1)
        for number, row in enumerate(rows):  # all pairs at once would not fit where sequences are long
            found += np.bincount((rows[number + 1 :] != row).sum(1), minlength=len(found))
        axes.plot(found / max(1, found.sum()), marker="o", ms=3, label=label)
    axes.set(xlabel="letters in which a pair differs (Hamming distance)", ylabel="share of pairs")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def fan_chart(forecast: Forecast, path: Path) -> None:
    """One panel a target: the window, the 50% and 90% intervals, ten paths, and what came if it is known."""
    times, paths, actual = forecast.times, forecast.paths, forecast.actual
    figure = Figure(figsize=(9, 3.4 * len(forecast.targets)), layout="constrained")
    for column, axes in enumerate(figure.subplots(len(forecast.targets), 1, squeeze=False)[:, 0]):
        axes.plot(forecast.past_times, forecast.past[:, column], color="black", lw=1.2, label="known")
        low, lower, middle, upper, high = np.quantile(paths[..., column], [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
        axes.fill_between(times, low, high, color="tab:blue", alpha=0.2, lw=0, label="90%")
        axes.fill_between(times, lower, upper, color="tab:blue", alpha=0.35, lw=0, label="50%")
        axes.plot(times, paths[:10, :, column].T, color="tab:blue", lw=0.4, alpha=0.6)
        axes.plot(times, middle, color="tab:blue", lw=1.6, label="median")
        if not np.isnan(actual[:, column]).all():
            axes.plot(times, actual[:, column], color="tab:red", lw=1.4, label="what came")
        axes.set(title=forecast.targets[column])
        axes.legend(fontsize=8, loc="upper left")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def comparison_plot(rows: Sequence[Summary], path: Path) -> None:
    """Exact TV, excess KL, mean score and modes of each variant over the noise; bars reach from least to most of the seeds."""
    panels = (("exact_tv", "exact total variation"), ("excess_kl", "excess KL [nats]"),
              ("mean_score", "mean score"), ("num_modes", "modes"))  # fmt: skip
    figure = Figure(figsize=(13, 8), layout="constrained")
    names = sorted({row.variant for row in rows})
    for number, (key, title) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 2, number)
        for index, name in enumerate(names):
            shown = sorted((row for row in rows if row.variant == name and key in row.figures), key=lambda r: r.noise)
            if not shown:
                continue
            x = np.array([row.noise for row in shown]) + 0.003 * (index - len(names) / 2)
            middle, low, high = np.array([row.figures[key] for row in shown]).T
            colour = colormaps["tab20"](index % 20)
            axes.errorbar(x, middle, [middle - low, high - middle], label=name, color=colour, marker="o", ms=4, lw=1.2)
        axes.set(xlabel="environment.noise", title=title)
        if key == "excess_kl":
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(1e-3, 0.8 * min(row.figures[key][1] for row in rows if key in row.figures)))
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=110)


def attention_maps(maps: Sequence[np.ndarray], texts: Sequence[str], path: Path) -> None:
    """Heat maps of attention weights [layers, heads, t, t] of each stream, which reads the t signs of `texts[stream]`."""
    rows = [(stream, layer) for stream, weights in enumerate(maps) for layer in range(len(weights))]
    num_heads, side = maps[0].shape[1], min(8.0, max(2.2, 0.16 * maps[0].shape[-1]))
    figure = Figure(figsize=(side * num_heads + 1, side * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), num_heads, squeeze=False)
    for axes_row, (stream, layer) in zip(grid, rows, strict=True):
        labels = list(texts[stream])
        for head, axes in enumerate(axes_row):
            image = axes.imshow(maps[stream][layer, head], vmin=0, vmax=1, cmap="magma")
            axes.set_title(f"{('realised', 'intended')[stream]}, layer {layer + 1}, head {head + 1}", fontsize=8)
            axes.set_xticks(range(len(labels)), labels, fontsize=6)
            axes.set_yticks(range(len(labels)), labels, fontsize=6)
    figure.colorbar(image, ax=grid, label="attention", shrink=0.6)
    figure.savefig(path, dpi=110)
