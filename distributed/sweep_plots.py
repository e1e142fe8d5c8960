"""Plots of a sweep's points: a heat map, or parallel coordinates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from distributed.search_space import Domain
from distributed.sweep_config import SweepConfig

Points = Sequence[tuple[dict[str, Any], float]]


def sweep_plot(points: Points, sweep: SweepConfig, metric: str, path: Path) -> None:
    """Values of `metric` at (point, value) pairs, best first: a heat map if two keys have listed values, otherwise lines."""
    domains = list(sweep.space.values())
    figure = Figure(figsize=(max(6, 1.8 * len(domains) + 3), 4.5), layout="constrained")
    axes = figure.add_subplot()
    if len(domains) == 2 and all(domain.is_listed for domain in domains):
        _heat_map(figure, axes, points, sweep)
        axes.set_title(f"median {metric}")
    else:
        _parallel_coordinates(figure, axes, points, sweep, metric)
    figure.savefig(path, dpi=110)


def text(value: Any) -> str:
    """A value in a few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _colours(points: Points, sweep: SweepConfig) -> tuple[Any, Normalize]:
    values = [value for _, value in points]
    spread = 1e-9 * (abs(values[0]) + 1)  # equal values have a colour too
    norm = Normalize(min(values) - spread, max(values) + spread)
    return colormaps["viridis_r" if sweep.mode == "min" else "viridis"], norm


def _heat_map(figure: Figure, axes: Any, points: Points, sweep: SweepConfig) -> None:
    y, x = sweep.space
    levels = {key: list(sweep.space[key].values) for key in (y, x)}
    cells = np.full((len(levels[y]), len(levels[x])), np.nan)
    for point, value in points:
        rows = (
            [levels[y].index(point[y])] if y in point else range(len(levels[y]))
        )  # a key without effect: all its cells
        columns = [levels[x].index(point[x])] if x in point else range(len(levels[x]))
        for row in rows:
            for column in columns:
                cells[row, column] = value
    colours, norm = _colours(points, sweep)
    image = axes.imshow(cells, cmap=colours, norm=norm, aspect="auto", origin="lower")
    axes.set_xticks(range(len(levels[x])), [text(value) for value in levels[x]])
    axes.set_yticks(range(len(levels[y])), [text(value) for value in levels[y]])
    for row, column in np.argwhere(np.isfinite(cells)):
        dark = sum(colours(norm(cells[row, column]))[:3]) < 1.5
        colour = "white" if dark else "black"
        axes.text(column, row, f"{cells[row, column]:.3g}", ha="center", va="center", color=colour)
    axes.set(xlabel=x, ylabel=y)
    figure.colorbar(image)


def _parallel_coordinates(figure: Figure, axes: Any, points: Points, sweep: SweepConfig, metric: str) -> None:
    keys = list(sweep.space)
    colours, norm = _colours(points, sweep)
    axis = np.arange(len(keys) + 1)
    for point, value in reversed(points):  # the best on top
        heights = np.array([*(_height(point.get(key), sweep.space[key]) for key in keys), float(norm(value))])
        shown = np.isfinite(heights)  # a key without effect is passed over
        axes.plot(axis[shown], heights[shown], color=colours(norm(value)), lw=1.4, marker=".", alpha=0.8)
    for place, key in enumerate(keys):
        domain = sweep.space[key]
        ends = domain.values if domain.is_listed else domain.extremes
        for number, value in enumerate(ends):
            height = number / max(1, len(ends) - 1)
            axes.annotate(text(value), (place, height), (-4, 0), textcoords="offset points", ha="right", fontsize=7)
        axes.axvline(place, color="lightgrey", lw=0.8, zorder=0)
    axes.set_xticks(axis, [*keys, metric], rotation=15, fontsize=8)
    axes.set(yticks=[], ylim=(-0.08, 1.08), xlim=(-0.4, len(keys) + 0.1))
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=metric)


def _height(value: Any, domain: Domain) -> float:
    """Place of a value between its domain's ends, in [0, 1]; NaN if the key had no effect at the point."""
    if value is None:
        return float("nan")
    if domain.is_listed:
        return list(domain.values).index(value) / max(1, len(domain.values) - 1)
    low, high = domain.extremes
    if "log" in domain.kind:
        low, high, value = np.log([low, high, value])
    return float((value - low) / (high - low))
