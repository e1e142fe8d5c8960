"""Bins of values: from normalised values to tokens and back. Shapes: P positions of a path, K bins, n paths."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

BinEdges = Literal["quantile", "uniform"]
BinValue = Literal["median", "uniform"]


@dataclass(frozen=True)
class Bins:
    """K bins of each position of a path; values beyond the outer edges belong to the outer bins."""

    edges: np.ndarray
    """float64 [P, K+1], ascending."""
    values: np.ndarray
    """float32 [P, K]: what a bin stands for: the median of the values that made it, or its middle if there are none."""

    @property
    def num_bins(self) -> int:
        """K."""
        return self.values.shape[1]

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Tokens int16 [n, P] of `values` float [n, P]."""
        inner = self.edges[:, 1:-1]
        columns = [np.searchsorted(inner[p], values[:, p], side="right") for p in range(len(inner))]
        return np.stack(columns, 1).astype(np.int16)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [n, P]: what the bins of `tokens` int [n, P] stand for."""
        return self.values[np.arange(len(self.values)), tokens]

    def decode_within(self, tokens: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """float64 [n, P]: a place inside each bin of `tokens` int [n, P], from `uniforms` float [n, P] in [0, 1)."""
        positions = np.arange(len(self.edges))
        low, high = self.edges[positions, tokens], self.edges[positions, tokens + 1]
        return low + uniforms * (high - low)

    def round_trip_error(self, values: np.ndarray) -> float:
        """Mean absolute error of `values` float [n, P] after encoding and decoding, in their units."""
        return float(np.abs(self.decode(self.encode(values)) - values).mean())

    def share_beyond(self, values: np.ndarray) -> float:
        """Share of `values` float [n, P] outside of the outer edges."""
        return float(((values < self.edges[:, 0]) | (values > self.edges[:, -1])).mean())


def make_bins(values: np.ndarray, num_bins: int, kind: BinEdges, margin: float = 0.0) -> Bins:
    """Bins for `values` float [n, P]: of equal counts (quantile), from the least value to the largest; or of equal width
    (uniform), from `margin` times that range below the least to as much above the largest.
    """
    if kind == "quantile":
        edges = np.quantile(values, np.linspace(0, 1, num_bins + 1), axis=0).T
    else:
        beyond = margin * np.ptp(values, axis=0)
        edges = np.linspace(values.min(0) - beyond, values.max(0) + beyond, num_bins + 1, axis=1)
    middles = (edges[:, 1:] + edges[:, :-1]) / 2
    bins = Bins(edges, middles.astype(np.float32))
    tokens = bins.encode(values)
    medians = middles.copy()
    for position, token in {(p, k) for p in range(values.shape[1]) for k in np.unique(tokens[:, p])}:
        medians[position, token] = np.median(values[tokens[:, position] == token, position])
    return Bins(edges, medians.astype(np.float32))
