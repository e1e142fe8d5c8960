"""Metrics of samples: against loops, and on a perfect sampler of SIX6."""

import itertools

import numpy as np
import pytest

from actors.oracles.tfbind8 import e_score_table
from learner.metrics import (
    SampleMetricsConfig,
    diverse_subset,
    find_modes,
    mean_pairwise_hamming,
    novelty,
    sample_metrics,
)
from tests import reference
from tests.reference import fixed_space


def samples(seed: int, count: int = 80, length: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Few letters and rounded scores, so that there are duplicates and ties."""
    rng = np.random.default_rng(seed)
    return rng.integers(3, size=(count, length)), np.round(rng.uniform(size=count), 1)


@pytest.mark.parametrize("distance", [0, 1, 2, 5])
@pytest.mark.parametrize("cutoff", [0.0, 0.5, 1.5])
def test_modes_equal_the_naive_ones(distance: int, cutoff: float):
    tokens, scores = samples(seed=distance)
    expected = reference.modes(tokens, scores, cutoff, distance)
    assert find_modes(tokens, scores, cutoff=cutoff, distance=distance).tolist() == expected
    assert bool(expected) == (cutoff <= 1)


def test_modes_include_scores_at_the_cutoff_and_exclude_near_ones():
    tokens = np.asarray([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1], [2, 2, 2, 2]])
    scores = np.asarray([0.9, 1.0, 0.95, 0.89])
    assert find_modes(tokens, scores, cutoff=0.9, distance=2).tolist() == [1]  # rows 0 and 2 are within 2 of row 1
    assert find_modes(tokens, scores, cutoff=0.9, distance=1).tolist() == [1, 0]
    assert find_modes(tokens, scores, cutoff=0.89, distance=2).tolist() == [1, 3]


@pytest.mark.parametrize("count", [2, 3, 80])
def test_pairwise_distance_equals_the_naive_one(count: int):
    tokens, _ = samples(seed=1, count=count)
    assert mean_pairwise_hamming(tokens) == pytest.approx(reference.mean_pairwise_hamming(tokens))


def test_pairwise_distance_of_extremes():
    assert mean_pairwise_hamming(np.zeros((4, 6), int)) == 0
    assert mean_pairwise_hamming(np.repeat(np.arange(4)[:, None], 6, 1)) == 6
    assert mean_pairwise_hamming(np.zeros((1, 6), int)) == 0


def test_sample_metrics_one_by_one():
    tokens, scores = samples(seed=2, count=150)
    metrics = sample_metrics(tokens, scores, SampleMetricsConfig(mode_cutoff=0.5, mode_distance=1))
    ordered = sorted(scores.tolist(), reverse=True)
    assert metrics == pytest.approx(
        {
            "mean_score": sum(ordered) / 150,
            "mean_score_error": (sum((s - sum(ordered) / 150) ** 2 for s in ordered) / 149 / 150) ** 0.5,
            "median_score": (ordered[74] + ordered[75]) / 2,
            "q90_score": ordered[15] + 0.9 * (ordered[14] - ordered[15]),
            "top100_mean": sum(ordered[:100]) / 100,
            "unique_fraction": len({tuple(row) for row in tokens.tolist()}) / 150,
            "mean_hamming": reference.mean_pairwise_hamming(tokens),
            "num_modes": len(reference.modes(tokens, scores, 0.5, 1)),
        }
    )


def test_one_sample_and_none():
    metrics = sample_metrics(np.asarray([[0, 1]]), np.asarray([0.95]), SampleMetricsConfig())
    assert (metrics["mean_score"], metrics["mean_score_error"], metrics["num_modes"]) == (0.95, np.inf, 1)
    with pytest.raises(ValueError, match="no sample"):
        sample_metrics(np.zeros((0, 2), int), np.zeros(0), SampleMetricsConfig())


def test_novelty_counts_distinct_sequences():
    reference_set = np.asarray([b"AC", b"GT"])
    assert novelty(np.asarray([b"AC", b"AC", b"TT", b"GG"]), reference_set) == pytest.approx(2 / 3)
    assert novelty(np.asarray([b"GT"]), reference_set) == 0
    assert novelty(np.asarray([b"AA"]), np.asarray([], dtype="S2")) == 1


def test_perfect_sampler_of_six6():
    """About 45 modes, mean .647 and top-100 mean .956 in 2,048 draws from the target of exponent 3.

    Standard deviations of one draw are 3.6, .0040 and .0034, so means of 20 draws have .81, .0009 and .00076. The
    tolerances are 5 of these: each fails for one seed in two million.
    """
    scores = e_score_table("SIX6_REF_R1").astype(np.float64)
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    weights, (tokens, _) = np.maximum(scores, 1e-3) ** 3, fixed_space(4, 8).enumerate()
    rng, names = np.random.default_rng(20), ("num_modes", "mean_score", "top100_mean")
    drawn = [rng.choice(len(scores), size=2048, p=weights / weights.sum()) for _ in range(20)]
    metrics = [sample_metrics(tokens[d], scores[d], SampleMetricsConfig()) for d in drawn]
    modes, mean, top = (np.mean([m[name] for m in metrics]) for name in names)
    assert modes == pytest.approx(44.9, abs=4.0)
    assert mean == pytest.approx(0.6472, abs=0.0045)
    assert mean == pytest.approx(float((weights * scores).sum() / weights.sum()), abs=0.0045)
    assert top == pytest.approx(0.9563, abs=0.0038)
    assert metrics[0]["num_modes"] == len(reference.modes(tokens[drawn[0]], scores[drawn[0]], 0.9, 2))


def test_a_diverse_subset_starts_with_the_best_and_is_as_the_plain_definition_says():
    rng = np.random.default_rng(0)
    tokens = np.unique(rng.integers(0, 3, (60, 6)), axis=0)
    scores = rng.integers(0, 5, len(tokens)).astype(float)
    chosen = [max(range(len(tokens)), key=lambda i: (scores[i], -i))]
    while len(chosen) < 12:
        distance = [min(int((tokens[i] != tokens[j]).sum()) for j in chosen) for i in range(len(tokens))]
        chosen.append(max(range(len(tokens)), key=lambda i: (distance[i], scores[i], -i)))
    assert diverse_subset(tokens, scores, 12).tolist() == chosen


def test_a_diverse_subset_is_at_least_half_as_far_apart_as_the_best():
    def apart(rows: np.ndarray) -> int:
        return min(int((a != b).sum()) for a, b in itertools.combinations(rows, 2))

    for seed in range(5):
        rng = np.random.default_rng(seed)
        tokens = np.unique(rng.integers(0, 2, (12, 8)), axis=0)
        best = max(apart(np.array(rows)) for rows in itertools.combinations(tokens, 4))
        assert 2 * apart(tokens[diverse_subset(tokens, rng.random(len(tokens)), 4)]) >= best


def test_a_diverse_subset_of_few():
    tokens = np.eye(3, dtype=int)
    assert sorted(diverse_subset(tokens, np.arange(3.0), 9)) == [0, 1, 2]
    assert len(diverse_subset(tokens[:0], np.zeros(0), 2)) == 0
