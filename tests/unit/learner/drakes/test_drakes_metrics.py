"""Metrics of designs: against loops, SciPy and closed forms."""

import numpy as np
import pytest
from scipy import stats

from learner.drakes.metrics import (
    DesignMetricsConfig,
    Reference,
    correlation,
    design_metrics,
    gc_rmse,
    kmer_shares,
    likelihood_z,
    nearest_hamming,
    rank_correlation,
    ranks,
)
from learner.metrics import NoSampleError

INTERVALS = ("mean_reward", "median_reward", "gc_mean", "gc_rmse", "kmer_correlation")


def random_tokens(count: int, length: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, size=(count, length))


def test_gc_rmse_of_known_sequences():
    tokens = np.array([[0, 0, 0, 0], [1, 2, 0, 3], [1, 1, 2, 2]])
    assert gc_rmse(tokens, 0.5) == pytest.approx(np.sqrt((0.25 + 0 + 0.25) / 3))


def test_kmer_shares_equal_counting():
    tokens, counts = random_tokens(40), np.zeros(64)
    for row in tokens:
        for start in range(4):
            counts[row[start] * 16 + row[start + 1] * 4 + row[start + 2]] += 1
    np.testing.assert_allclose(kmer_shares(tokens, 3), counts / 160)


def test_correlations_are_those_of_scipy():
    a, b = np.random.default_rng(1).normal(size=(2, 50)).round(1)
    np.testing.assert_allclose(ranks(a), stats.rankdata(a) - 1)
    assert correlation(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(correlation(a, np.ones(50)))
    assert rank_correlation(a, np.exp(3 * a)) == pytest.approx(1)


@pytest.mark.parametrize("chunk", [4_000_000, 70])
def test_nearest_distances_equal_the_loop(monkeypatch, chunk):
    monkeypatch.setattr("learner.drakes.metrics._CHUNK_ENTRIES", chunk)
    tokens, others = random_tokens(30), random_tokens(25, seed=1)
    expected = [
        min(int((row != other).sum()) for j, other in enumerate(tokens) if i != j) for i, row in enumerate(tokens)
    ]
    assert nearest_hamming(tokens).tolist() == expected
    assert nearest_hamming(tokens, others).tolist() == [int((others != row).sum(1).min()) for row in tokens]
    assert nearest_hamming(np.repeat(tokens[:1], 2, 0)).tolist() == [0, 0]
    for empty in (lambda: nearest_hamming(tokens[:1]), lambda: nearest_hamming(tokens, others[:0])):
        with pytest.raises(NoSampleError):
            empty()


def test_likelihood_z_has_two_sides():
    reference = np.array([-70.0, -66.0, -62.0])
    spread = reference.std()
    assert likelihood_z(np.array([-60.0, -58.0]), reference) == pytest.approx(7 / spread)
    assert likelihood_z(np.array([-80.0]), reference) == pytest.approx(-14 / spread)
    assert likelihood_z(reference, reference) == pytest.approx(0)


def test_all_metrics_of_designs():
    rng, tokens, reference = np.random.default_rng(2), random_tokens(200, 12), random_tokens(500, 12, seed=3)
    rewards, shift = rng.normal(size=200), 0.7
    metrics = design_metrics(
        tokens, rewards, Reference(reference, rng.normal(-5, 2, size=500)), DesignMetricsConfig(gc_target=0.4), rng,
        predicted=rewards + shift, log_likelihoods=np.full(200, -5.0),
    )  # fmt: skip
    for name in (*INTERVALS, "reward_gap", "likelihood_z"):
        assert metrics[f"{name}_low"] <= metrics[name] + 1e-12, name
        assert metrics[name] <= metrics[f"{name}_high"] + 1e-12 or name == "kmer_correlation", name
    assert metrics["reward_gap"] == pytest.approx(shift)
    assert abs(metrics["likelihood_z"]) < 0.2
    error = stats.sem(rewards)
    assert metrics["mean_reward_high"] - metrics["mean_reward_low"] == pytest.approx(3.92 * error, rel=0.2)
    assert metrics["unique_fraction"] == len({tuple(row) for row in tokens.tolist()}) / 200
    assert metrics["nearest_hamming"] == nearest_hamming(tokens).mean()
    assert metrics["gc_rmse"] == gc_rmse(tokens, 0.4)


def test_what_is_not_known_is_left_out():
    tokens = random_tokens(10)
    rng = np.random.default_rng(0)
    metrics = design_metrics(tokens, np.arange(10.0), Reference(tokens), DesignMetricsConfig(), rng)
    assert metrics["kmer_correlation"] == pytest.approx(1)
    assert "reward_gap" not in metrics
    assert "likelihood_z" not in metrics
    with pytest.raises(NoSampleError, match="at least 2"):
        design_metrics(tokens[:1], np.zeros(1), Reference(tokens), DesignMetricsConfig(), rng)
