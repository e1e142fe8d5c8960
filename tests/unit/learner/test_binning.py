"""Bins: counts, round trip, places inside, values beyond."""

import numpy as np
import pytest

from learner.binning import make_bins

VALUES = np.random.default_rng(0).normal(size=(400, 3)) * [1, 2, 3]


@pytest.mark.parametrize("kind", ["quantile", "uniform"])
def test_values_come_back_within_their_bin(kind):
    bins = make_bins(VALUES, 16, kind)
    tokens = bins.encode(VALUES)
    assert tokens.min() == 0
    assert tokens.max() == 15
    widths = np.take_along_axis(np.diff(bins.edges, axis=1).T, tokens, 0)
    assert (np.abs(bins.decode(tokens) - VALUES) <= widths + 1e-6).all()
    inside = bins.decode_within(tokens, np.random.default_rng(1).random(tokens.shape))
    assert (bins.encode(inside) == tokens).mean() > 0.999  # edges apart
    assert bins.share_beyond(VALUES) == 0
    assert bins.round_trip_error(VALUES) == pytest.approx(np.abs(bins.decode(tokens) - VALUES).mean())


def test_more_bins_lose_less():
    errors = [make_bins(VALUES, count, "quantile").round_trip_error(VALUES) for count in (2, 8, 32)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_quantile_bins_hold_equal_counts_and_stand_for_their_median():
    bins = make_bins(VALUES, 8, "quantile")
    tokens = bins.encode(VALUES)
    assert (np.bincount(tokens[:, 1], minlength=8) == 50).all()
    assert bins.values[1, 3] == pytest.approx(np.median(VALUES[tokens[:, 1] == 3, 1]))


def test_values_beyond_belong_to_the_outer_bins():
    bins = make_bins(VALUES, 8, "uniform")
    assert bins.encode(np.array([[-99.0, 99, 0]]))[0, :2].tolist() == [0, 7]
    assert bins.share_beyond(np.array([[-99.0, 99, 0]])) == pytest.approx(2 / 3)


def test_an_empty_bin_stands_for_its_middle():
    bins = make_bins(np.array([[0.0], [1.0]]), 4, "uniform")
    assert bins.values[0].tolist() == [0, 0.375, 0.625, 1]
