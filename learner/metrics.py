"""Metrics of a set of samples. Shapes: n samples, T positions."""

import numpy as np
from pydantic import Field

from learner.configs import StrictConfig


class SampleMetricsConfig(StrictConfig):
    """How many samples are drawn for the sample metrics, and what counts as a mode."""

    num_samples: int = Field(2048, ge=2, le=1_000_000)
    """Sequences drawn (with the environment's noise) for each evaluation."""
    mode_cutoff: float = Field(0.9, ge=0)
    """A mode scores at least this (units of the score)."""
    mode_distance: int = Field(2, ge=0)
    """Modes differ from each other in more than this many positions."""


class NoSampleError(ValueError):
    """There is nothing to measure."""


def find_modes(tokens: np.ndarray, scores: np.ndarray, *, cutoff: float, distance: int) -> np.ndarray:
    """Indices of the modes among `tokens` int [n, T] with `scores` float [n], best first.

    Visits samples in order of falling score and keeps one if its Hamming distance to every kept one exceeds `distance`
    and its score reaches `cutoff`.
    """
    candidates = np.flatnonzero(scores >= cutoff)
    candidates = candidates[np.argsort(-scores[candidates], kind="stable")]
    kept: list[int] = []
    while len(candidates):
        kept.append(int(candidates[0]))
        candidates = candidates[(tokens[candidates] != tokens[candidates[0]]).sum(1) > distance]
    return np.asarray(kept, dtype=np.int64)


def diverse_subset(tokens: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of up to `count` of `tokens` int [n, T], all different: the best by `scores` float [n], then always the one
    whose nearest chosen neighbour (Hamming) is farthest, of several the best.

    The least distance among them is at least half the largest that so many can have (Ravi et al. 1994, Operations Research
    42:299).
    """
    order = np.argsort(-scores, kind="stable")
    by_position = np.ascontiguousarray(tokens[order].T)
    chosen = np.zeros(min(count, len(tokens)), dtype=np.int64)
    nearest = np.full(len(tokens), tokens.shape[1] + 1)
    for number in range(len(chosen)):
        pick = chosen[number] = nearest.argmax()
        np.minimum(nearest, (by_position != by_position[:, pick, None]).sum(0), out=nearest)
        nearest[pick] = -1
    return order[chosen]


def mean_pairwise_hamming(tokens: np.ndarray) -> float:
    """Mean number of differing positions over all pairs of `tokens` int [n, T], from per-position counts."""
    count = len(tokens)
    if count < 2:
        return 0.0
    agreeing = 0.0
    for column in tokens.T:
        occurrences = np.unique(column, return_counts=True)[1].astype(np.float64)
        agreeing += (occurrences * (occurrences - 1)).sum()
    return float(tokens.shape[1] - agreeing / (count * (count - 1)))


def unique_fraction(tokens: np.ndarray) -> float:
    """Distinct rows of `tokens` int [n, T], n > 0, as a share of all."""
    return len(np.unique(tokens, axis=0)) / len(tokens)


def sample_metrics(tokens: np.ndarray, scores: np.ndarray, config: SampleMetricsConfig) -> dict[str, float]:
    """Score and diversity of samples `tokens` int [n, T] (one token for all padding) with `scores` float [n].

    `mean_score_error` is the standard error of the mean. Raises NoSampleError if there is no sample.
    """
    if len(tokens) == 0:
        raise NoSampleError("no sample to measure: every one was rejected")
    ordered = np.sort(scores)[::-1]
    return {
        "mean_score": float(scores.mean()),
        "mean_score_error": float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else float("inf"),
        "median_score": float(np.median(scores)),
        "q90_score": float(np.quantile(scores, 0.9)),
        "top100_mean": float(ordered[:100].mean()),
        "unique_fraction": unique_fraction(tokens),
        "mean_hamming": mean_pairwise_hamming(tokens),
        "num_modes": len(find_modes(tokens, scores, cutoff=config.mode_cutoff, distance=config.mode_distance)),
    }


def novelty(sequences: np.ndarray, reference: np.ndarray) -> float:
    """Share of the distinct `sequences` bytes [n] that are not in `reference` bytes [m]."""
    distinct = np.unique(sequences)
    return float(np.isin(distinct, reference, invert=True).mean())
