"""Series: reading, checking, windows, normalisation, and that nothing of the future leaks into the past."""

import numpy as np
import pandas as pd
import pytest

from actors.environments.time_series import PathScorer, TimeSeriesTask, path_environment
from actors.series import GAP, DataConfig, Series, SeriesError, load_series

ROWS = 60


def frame(**columns) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    dates = pd.date_range("2000-01-01", periods=ROWS, freq="D")
    return pd.DataFrame({"day": dates, "y": rng.normal(size=ROWS).cumsum() + 20, "x": rng.normal(size=ROWS)} | columns)


@pytest.fixture
def load(tmp_path):
    def make(table: pd.DataFrame, parquet: bool = False, **settings) -> Series:
        path = tmp_path / ("s.parquet" if parquet else "s.csv")
        table.to_parquet(path) if parquet else table.to_csv(path, index=False)
        return load_series(config(path=path, **settings))

    return make


def config(**settings) -> DataConfig:
    given = {"time_column": "day", "targets": ("y",), "window": 6, "horizon": 4, "season": 7, "num_bins": 8}
    return DataConfig(**(given | settings))


def task(values: np.ndarray, **settings) -> TimeSeriesTask:
    columns = ("y", "x")[: values.shape[1]]
    return TimeSeriesTask(config(path="unused.csv", **settings), Series(pd.RangeIndex(len(values)), columns, values))


def walk(rows: int = ROWS, columns: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).cumsum(0) + 50


@pytest.mark.parametrize("parquet", [False, True])
def test_a_file_is_read_with_its_targets_first(load, parquet):
    series = load(frame()[["day", "x", "y"]], parquet)
    assert series.columns == ("y", "x")
    assert np.allclose(series.values[:, 0], frame()["y"])
    assert series.times[1] == pd.Timestamp("2000-01-02")


def test_chosen_features_and_logarithms(load):
    series = load(frame(name=["a"] * ROWS), features=(), log=("y",))
    assert series.columns == ("y",)
    assert np.allclose(np.exp(series.values[:, 0]), frame()["y"])


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"y": [1.0] * 9 + [None] + [2.0] * 50}, {}, "'y' has no finite value at 2000-01-10.*row 10.*data.impute"),
        (
            {"y": [None] + [1.0, 2.0] * 29 + [3.0]},
            {"impute": "forward"},
            "'y' has no finite value at 2000-01-01.*row 1",
        ),
        ({"x": ["1"] * 4 + ["much"] + ["2"] * 55}, {}, "'x' has no number at 2000-01-05.*row 5.*'much'"),
        ({"day": ["2000-01-01", "2000-01-03", "2000-01-02"] * 20}, {}, "2000-01-02 .*row 3 is before 2000-01-03"),
        ({"day": ["2000-01-01", "2000-01-01", "2000-01-02"] * 20}, {}, "2000-01-01 .*row 2 is there twice"),
        ({"day": ["2000-01-01", "once"] * 30}, {}, "'day' has no date in row 2.*once"),
        ({}, {"targets": ("z",)}, "data.targets: there is no column 'z'; allowed: y, x"),
        ({}, {"features": ("z",)}, "data.features: there is no column 'z'"),
        ({}, {"time_column": "z"}, "no column 'z'; allowed: day, y, x"),
        ({"x": range(ROWS)}, {"log": ("x",)}, "'x' is 0 at 2000-01-01.*above 0"),
        ({}, {"resample": "QQQ"}, "data.resample: got 'QQQ'"),
        ({"day": range(ROWS)}, {"resample": "MS"}, "data.resample needs dates"),
    ],
)
def test_faults_are_named(load, changes, settings, message):
    with pytest.raises(SeriesError, match=message):
        load(frame(**changes), **settings)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(SeriesError, match=r"none\.csv cannot be read"):
        load_series(config(path=tmp_path / "none.csv"))
    (tmp_path / "s.parquet").write_bytes(b"no parquet")
    with pytest.raises(SeriesError, match=r"is no \.parquet file"):
        load_series(config(path=tmp_path / "s.parquet"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "one of dataset and path"),
        ({"dataset": "co2"}, "one of dataset and path"),
        ({"targets": ()}, "needs a time_column and targets"),
        ({"targets": ("y", "y")}, "twice"),
        ({"train_share": 0.8, "validation_share": 0.2}, "below 1"),
        ({"centre": "season", "window": 3}, "at least one season"),
        ({"num_bins": 65}, "num_bins"),
        ({"horizon": 512, "targets": tuple("abcdefghi")}, "at most 4,096"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**({"path": "s.csv"} | settings))


def test_missing_values_take_the_last_known_one_only(load):
    values = frame()["y"].to_numpy().copy()
    values[[5, 6, 20]] = np.nan
    filled = load(frame(y=values), impute="forward").values[:, 0]
    assert filled[[5, 6, 20]].tolist() == filled[[4, 4, 19]].tolist()


def test_uneven_times_are_a_feature_and_even_ones_are_not(load):
    uneven = frame()["day"].to_numpy().copy()
    uneven[30:] += np.timedelta64(3, "D")
    series = load(frame(day=uneven))
    assert series.columns[-1] == GAP
    gaps = series.values[:, -1]
    assert gaps[30] == 4 * gaps[29]
    assert load(frame(day=np.arange(ROWS) * 0.5)).columns == ("y", "x")
    months = pd.date_range("2000-01-01", periods=ROWS, freq="MS")  # 28 to 31 days
    assert load(frame(day=months)).columns == ("y", "x")


def test_times_after_the_end_go_on(load):
    months = pd.date_range("2000-01-01", periods=ROWS, freq="MS")
    series = load(frame(day=months))
    assert series.next_times(ROWS - 2, 3).tolist() == list(pd.date_range(months[-1], periods=3, freq="MS"))
    numbered = load(frame(day=np.arange(ROWS) * 2))
    assert numbered.next_times(ROWS - 1, 2).tolist() == [120, 122]
    assert numbered.row("118") == ROWS - 1
    with pytest.raises(SeriesError, match="no row has the time '119'"):
        numbered.row("119")


@pytest.mark.parametrize("dataset", ["macrodata", "co2", "sunspots", "elnino"])
def test_series_of_statsmodels(dataset):
    resampled = {"resample": "MS", "impute": "forward"} if dataset == "co2" else {}
    series = load_series(DataConfig(dataset=dataset, **resampled))
    rows, columns = {"macrodata": (203, 12), "co2": (526, 1), "sunspots": (309, 1), "elnino": (732, 1)}[dataset]
    assert series.values.shape == (rows, columns)


def test_splits_are_in_order_and_futures_do_not_overlap():
    found = task(walk(), horizon=4, window=6)
    train, validation, test = (found.origins(split) for split in ("train", "validation", "test"))
    assert train[0] == 5
    assert train[-1] + 4 == found.num_train - 1
    assert (validation[0] + 1, validation[-1] + 4) == (found.num_train, found.num_known - 1)
    assert (test[0] + 1, test[-1] + 4) == (found.num_known, ROWS - 1)
    assert (np.diff(task(walk(), stride=3).origins("train")) == 3).all()


@pytest.mark.parametrize("centre", ["none", "last", "season"])
def test_nothing_of_the_future_leaks_into_the_past(centre):
    """Other values after the training rows change neither statistics nor training windows; of a later window, no input."""
    values = walk()
    settings = {"centre": centre, "season": 5, "window": 6}
    before = task(values, **settings)
    changed = values.copy()
    changed[before.num_train :] = -7 * changed[before.num_train :] + 1
    after = task(changed, **settings)
    for old, new in zip(before.learner_data(), after.learner_data(), strict=True):
        assert np.array_equal(old, new)
    origin = before.origins("test")[:1]
    changed = values.copy()
    changed[origin[0] + 1 :] += 100
    old, new = before.windows(origin), task(changed, **settings).windows(origin)
    assert np.array_equal(old.inputs, new.inputs)
    assert np.array_equal(old.centres, new.centres)
    assert not np.allclose(old.actual, new.actual)


@pytest.mark.parametrize("centre", ["none", "last", "season"])
@pytest.mark.parametrize("logged", [(), ("y",)])
def test_values_come_back(centre, logged):
    """Tokens of true futures, turned into values: as near as the bins are narrow."""
    values = walk(200)
    values[:, 0] = np.log(values[:, 0]) if logged else values[:, 0]
    found = task(values, centre=centre, season=5, num_bins=64, log=logged)
    data, windows = found.learner_data(), found.split("train")
    assert data.futures.mean(0) == pytest.approx(np.zeros(4), abs=1e-5)
    assert data.futures.std(0) == pytest.approx(np.ones(4), abs=1e-5)
    assert data.windows.std((0, 1)) == pytest.approx(np.ones(2), abs=1e-4)
    back, truth = found.to_units(data.tokens, windows.centres, None), found.original(windows.actual)
    assert np.abs(back - truth).mean() < 0.03 * truth.std()
    inside = found.to_units(data.tokens, windows.centres, np.random.default_rng(0))
    assert np.abs(inside - truth).mean() < 0.05 * truth.std()
    assert found.history()[10:14, 0] == pytest.approx(found.original(found.windows(np.array([9])).actual)[0])


def test_the_centre_is_a_season_before():
    values = np.arange(40.0)[:, None] ** 1.5
    found = task(values, centre="season", season=3, horizon=4, window=4)
    assert found.windows(np.array([10])).centres[0] == pytest.approx(values[[8, 9, 10, 8], 0])


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        (walk(12), {}, "12 rows are too few: no train window has room for window 6 and horizon 4"),
        (walk(24), {"validation_share": 0.1}, "no validation window"),
        (walk(30), {"validation_share": 0.25}, "no test window"),
        (np.column_stack([walk()[:, 0], np.ones(ROWS)]), {}, "'x' is constant .*data.features"),
        (np.column_stack([np.arange(ROWS), walk()[:, 0]]), {}, "'y' has the same future"),
    ],
)
def test_series_that_cannot_be_learned(values, settings, message):
    with pytest.raises(SeriesError, match=message):
        task(values, **settings)


def test_two_targets_make_paths_of_both():
    found = task(walk(), targets=("y", "x"))
    windows = found.windows(np.array([20]))
    assert windows.actual.reshape(4, 2) == pytest.approx(found.series.values[21:25])


@pytest.mark.parametrize(("error", "power"), [("mse", 2), ("mae", 1)])
def test_scores_are_exp_of_minus_the_error(error, power):
    found = task(walk())
    tokens, contexts = np.array([[0, 1, 2, 3], [7, 7, 7, 7]]), np.array([3, 5])
    scores = PathScorer(found, error).score(np.column_stack([contexts, tokens]), np.full(2, 4))
    for row in range(2):
        truth = found.split("train").futures[contexts[row]]
        errors = [abs(found.bins.values[p, tokens[row, p]] - truth[p]) ** power for p in range(4)]
        assert scores[row] == pytest.approx(np.exp(-np.mean(errors)), rel=1e-5)


def test_noise_moves_to_a_neighbour():
    kernel = path_environment(config(path="s.csv", num_bins=4), 0.2).kernel
    assert kernel.shape == (4, 4, 4)
    assert np.allclose(kernel.sum(-1), 1)
    assert kernel[0, 0].tolist() == pytest.approx([0.8, 0.2, 0, 0])
    assert kernel[3, 2].tolist() == pytest.approx([0, 0.1, 0.8, 0.1])
