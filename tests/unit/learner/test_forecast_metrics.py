"""CRPS, coverage and MASE against slow definitions."""

import numpy as np
import pytest

from learner.forecast_metrics import coverage, crps, forecast_metrics, mase_scale


def reference_crps(paths: np.ndarray, y: float) -> float:
    """The double sum, Gneiting & Raftery 2007, eq. 21."""
    count = len(paths)
    spread = sum(abs(a - b) for a in paths for b in paths) / count**2
    return sum(abs(a - y) for a in paths) / count - spread / 2


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_crps_is_the_double_sum(count):
    rng = np.random.default_rng(count)
    paths, actual = rng.normal(size=(3, count, 2)).round(1), rng.normal(size=(3, 2))
    expected = [[reference_crps(paths[o, :, p], actual[o, p]) for p in range(2)] for o in range(3)]
    assert np.allclose(crps(paths, actual), expected)


def test_crps_of_one_value_is_its_absolute_error_and_of_a_normal_law_the_closed_form():
    assert crps(np.full((1, 9, 1), 2.0), np.array([[5.0]]))[0, 0] == pytest.approx(3)
    paths = np.random.default_rng(0).normal(size=(1, 200_000, 1))  # N(0, 1) at 0: (√2 - 1)/√π; s.e. 1e-3
    assert crps(paths, np.zeros((1, 1)))[0, 0] == pytest.approx((2**0.5 - 1) / np.pi**0.5, abs=5e-3)


def test_coverage_counts_what_lies_between_the_quantiles():
    paths = np.tile(np.linspace(0, 1, 101)[None, :, None], (4, 1, 1))
    assert coverage(paths, np.array([[0.04], [0.06], [0.94], [0.96]]), 0.9) == 0.5


def test_mase_is_one_for_the_seasonal_naive_error():
    values = np.array([[0.0], [10], [1], [12]])
    assert mase_scale(values, 2) == pytest.approx([1.5])
    figures = forecast_metrics(np.full((1, 5, 1), 3.0), np.array([[4.5]]), np.array([1.5]), np.ones(1))
    assert figures["mase"] == pytest.approx(1)
    assert figures["mae"] == figures["rmse"] == figures["crps"] == pytest.approx(1.5)
