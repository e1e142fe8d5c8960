"""A multivariate time series from a file or from statsmodels, read and checked.

Shapes: N rows (times), F columns.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from learner.binning import BinEdges, BinValue
from learner.configs import AbsolutePath, StrictConfig

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)
DatasetName = Literal["macrodata", "co2", "sunspots", "elnino"]
DEFAULT_TARGETS: dict[str, str] = {"macrodata": "unemp", "co2": "co2", "sunspots": "sunspots", "elnino": "temperature"}
GAP = "time_gap"
"""Feature of series whose time stamps are not evenly spaced: time since the row before."""
EVEN = 1e-6
"""Relative difference between steps that still counts as even."""


class SeriesError(ValueError):
    """A series that cannot be used; the message names the column, and the row or time."""


class DataConfig(StrictConfig):
    """Which series is forecast, and how it becomes windows and tokens (generator.name forecast)."""

    dataset: DatasetName | None = None
    """A series that comes with statsmodels; null: `path`."""
    path: AbsolutePath | None = None
    """CSV or Parquet file, a row a time."""
    time_column: str | None = None
    """path: its column of dates or numbers, ascending."""
    targets: tuple[str, ...] = ()
    """Columns to forecast; of a dataset, by default: unemp, co2, sunspots or temperature."""
    features: tuple[str, ...] | None = None
    """Columns that windows show, besides the targets; null: all."""
    log: tuple[str, ...] = ()
    """Columns replaced by their logarithm; forecasts are turned back."""
    resample: str | None = Field(None, pattern=r"^[0-9]{0,3}[A-Za-z-]{1,10}$")
    """Interval to average over, as pandas writes it (MS: months); null: rows as they are. Needs dates."""
    impute: Literal["none", "forward"] = "none"
    """Missing values: an error, or the last known value before them (no later value is ever looked at)."""
    window: int = Field(24, ge=1, le=4096)
    """W: rows that a forecast may look back on."""
    horizon: int = Field(12, ge=1, le=512)
    """H: rows to forecast."""
    stride: int = Field(1, ge=1)
    """Rows between the beginnings of two training windows; `window` + `horizon` or more: they do not overlap."""
    season: int = Field(1, ge=1)
    """Rows of a season, for the seasonal-naive baseline, the scale of MASE and `centre`; 1: none."""
    train_share: float = Field(0.7, gt=0, lt=1)
    """First share of the rows: training."""
    validation_share: float = Field(0.15, gt=0, lt=1)
    """Next share: choice of settings. What is left is the test."""
    centre: Literal["none", "last", "season"] = "last"
    """What is subtracted from a target before it is normalised: nothing; its last value in the window, for series that
    wander; its value one or more whole seasons before. Windows are shown less their last row, unless none."""
    num_bins: int = Field(32, ge=2, le=64)
    """K: tokens of a value."""
    bins: BinEdges = "uniform"
    """Bins of equal width, or of equal counts, of the training futures at each step of the horizon."""
    bin_margin: float = Field(0.2, ge=0, le=10)
    """uniform bins: how far they reach beyond the training futures, as a share of their range."""
    bin_value: BinValue = "uniform"
    """What a token of a forecast turns into: a place in its bin at random, or the bin's median."""

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if (self.dataset is None) == (self.path is None):
            raise ValueError("one of dataset and path is needed, and only one")
        if self.path is not None and (self.time_column is None or not self.targets):
            raise ValueError("path needs a time_column and targets, of which this file's columns are the choice")
        if self.path is None and self.time_column is not None:
            raise ValueError("time_column goes with path")
        if self.train_share + self.validation_share >= 1:
            raise ValueError("train_share + validation_share must stay below 1: the rest is the test")
        if self.centre == "season" and self.window < self.season:
            raise ValueError(f"centre: season needs a window of at least one season ({self.season}), got {self.window}")
        if self.centre == "season" and self.season == 1:
            raise ValueError("centre: season needs a season of more than one row")
        if self.num_positions > 4096:
            raise ValueError(f"horizon × targets: {self.num_positions}; at most 4,096 values a path are allowed")
        if len(set(self.target_names)) < len(self.target_names):
            raise ValueError(f"targets: {', '.join(self.target_names)} has a column twice")
        return self

    @property
    def target_names(self) -> tuple[str, ...]:
        """Columns to forecast."""
        return self.targets or (DEFAULT_TARGETS[self.dataset or ""],)

    @property
    def num_positions(self) -> int:
        """P: values of a path, `horizon` × targets."""
        return self.horizon * len(self.target_names)


@dataclass(frozen=True)
class Series:
    """Checked values: finite, in the order of time. Targets are columns like the others."""

    times: "pd.Index"
    """N distinct ascending dates or numbers."""
    columns: tuple[str, ...]
    """F names; the last may be `GAP`."""
    values: np.ndarray
    """float64 [N, F]; logarithms where `log` asks for them."""

    def __len__(self) -> int:
        return len(self.values)

    def column(self, name: str) -> int:
        """Place of a column."""
        return self.columns.index(name)

    def row(self, time: str) -> int:
        """The row at a time that the user wrote; raises SeriesError if there is none."""
        import pandas as pd

        try:
            wanted = pd.Timestamp(time) if isinstance(self.times, pd.DatetimeIndex) else float(time)
            return int(self.times.get_loc(wanted))
        except (ValueError, TypeError, KeyError) as error:
            ends = f"from {self.times[0]} to {self.times[-1]}"
            raise SeriesError(
                f"--origin: no row has the time {time[:40]!r}; allowed: a time of the series, {ends}"
            ) from error

    def next_times(self, after: int, count: int) -> "pd.Index":
        """Times of the `count` rows after row `after`; beyond the last row, at the usual step."""
        import pandas as pd

        known = self.times[after + 1 : after + 1 + count]
        missing = count - len(known)
        if not missing:
            return known
        step = pd.infer_freq(self.times) if isinstance(self.times, pd.DatetimeIndex) and len(self) > 2 else None
        if step is not None:
            later: pd.Index = pd.date_range(self.times[-1], periods=missing + 1, freq=step)[1:]
        else:
            gap = pd.Series(self.times).diff().median()
            later = pd.Index([self.times[-1] + gap * n for n in range(1, missing + 1)])
        return known.append(later) if len(known) else later


def load_series(config: DataConfig) -> Series:
    """The series that `config` names; raises SeriesError for whatever is wrong with it."""
    frame = _read_dataset(config.dataset) if config.dataset is not None else _read_file(config)
    if config.resample is not None:
        frame = _resampled(frame, config.resample)
    frame = frame[_wanted(frame, config)]
    values = _numbers(frame)
    if config.impute == "forward":
        values = _carried_forward(values)
    _check_values(values, frame)
    for name in config.log:
        values[:, _place(frame, name, "log")] = _logarithm(values[:, _place(frame, name, "log")], name, frame)
    columns, gaps = tuple(frame.columns), _gaps(frame.index)
    if gaps is not None:
        values, columns = np.column_stack([values, gaps]), (*columns, GAP)
    return Series(frame.index, columns, values)


def _read_dataset(name: str) -> "pd.DataFrame":
    import pandas as pd
    import statsmodels.datasets as datasets

    frame = getattr(datasets, name).load_pandas().data
    if name == "macrodata":
        quarters = pd.PeriodIndex.from_fields(year=frame.year.astype(int), quarter=frame.quarter.astype(int), freq="Q")
        return frame.drop(columns=["year", "quarter"]).set_index(quarters.to_timestamp())
    if name == "sunspots":
        return frame.set_index("YEAR").rename(columns={"SUNACTIVITY": "sunspots"})
    if name == "elnino":
        return monthly(frame)
    return frame


def monthly(frame: "pd.DataFrame") -> "pd.DataFrame":
    """One row a month, from one row a year with columns YEAR, JAN .. DEC."""
    import pandas as pd

    years = frame["YEAR"].astype(int)
    dates = pd.date_range(f"{years.iloc[0]}-01-01", periods=12 * len(frame), freq="MS")
    return pd.DataFrame({"temperature": frame.drop(columns="YEAR").to_numpy().reshape(-1)}, index=dates)


def _read_file(config: DataConfig) -> "pd.DataFrame":
    import pandas as pd

    path, column = config.path, config.time_column
    assert path is not None
    read: Callable[..., pd.DataFrame] = pd.read_parquet if path.suffix.lower() in (".parquet", ".pq") else pd.read_csv
    try:
        frame = read(path)
    except OSError as error:
        raise SeriesError(f"data.path: {path} cannot be read ({error})") from error
    except Exception as error:  # pandas and pyarrow raise many types for files of another kind
        raise SeriesError(f"data.path: {path} is no {path.suffix or 'CSV'} file with a row a time ({error})") from error
    if column not in frame.columns:
        raise SeriesError(f"data.time_column: {path} has no column {column!r}; allowed: {_listed(frame)}")
    times = frame.pop(column)
    if not pd.api.types.is_numeric_dtype(times):
        stamps = pd.to_datetime(times, errors="coerce", utc=False, format="mixed")
        if stamps.isna().any():
            row = int(np.flatnonzero(stamps.isna())[0])
            raise SeriesError(f"{path}: column {column!r} has no date in row {row + 1} ({times.iloc[row]!r})")
        times = stamps
    elif not np.isfinite(times.to_numpy(float)).all():
        row = int(np.flatnonzero(~np.isfinite(times.to_numpy(float)))[0])
        raise SeriesError(f"{path}: column {column!r} has no time in row {row + 1}")
    _check_order(times.to_numpy(), times, str(path), str(column))
    return frame.set_index(pd.Index(times))


def _check_order(times: np.ndarray, shown: "pd.Series", path: str, column: str) -> None:
    steps = times[1:] > times[:-1]
    if steps.all():
        return
    row = int(np.flatnonzero(~steps)[0]) + 1
    fault = "is there twice" if times[row] == times[row - 1] else f"is before {shown.iloc[row - 1]}, that of row {row}"
    raise SeriesError(
        f"{path}: column {column!r}: the time {shown.iloc[row]} of row {row + 1} {fault}; allowed: ascending"
    )


def _resampled(frame: "pd.DataFrame", interval: str) -> "pd.DataFrame":
    import pandas as pd

    if not isinstance(frame.index, pd.DatetimeIndex):
        raise SeriesError("data.resample needs dates; the times of this series are numbers")
    _numbers(frame)  # names what is no number
    try:
        return frame.resample(interval).mean()
    except ValueError as error:
        raise SeriesError(
            f"data.resample: got {interval!r}; allowed are intervals of pandas, such as MS ({error})"
        ) from error


def _wanted(frame: "pd.DataFrame", config: DataConfig) -> list[str]:
    """Targets first, then the other features."""
    for key, names in (("targets", config.target_names), ("features", config.features or ()), ("log", config.log)):
        for name in names:
            _place(frame, name, key)
    others = frame.columns if config.features is None else config.features
    return [*config.target_names, *(name for name in others if name not in config.target_names)]


def _place(frame: "pd.DataFrame", name: str, key: str) -> int:
    if name not in frame.columns:
        raise SeriesError(f"data.{key}: there is no column {name!r}; allowed: {_listed(frame)}")
    return list(frame.columns).index(name)


def _listed(frame: "pd.DataFrame") -> str:
    return ", ".join(str(name) for name in frame.columns[:50])


def _numbers(frame: "pd.DataFrame") -> np.ndarray:
    """float64 [N, F], NaN where a value is missing."""
    import pandas as pd

    columns = []
    for name in frame.columns:
        numbers = pd.to_numeric(frame[name], errors="coerce")
        wrong = np.flatnonzero(numbers.isna() & frame[name].notna())
        if len(wrong):
            raise SeriesError(
                f"column {name!r} has no number at {frame.index[wrong[0]]} (row {wrong[0] + 1}): "
                f"{str(frame[name].iloc[wrong[0]])[:40]!r}; name the columns to use in data.features"
            )
        columns.append(numbers.to_numpy(np.float64))
    return np.column_stack(columns)


def _carried_forward(values: np.ndarray) -> np.ndarray:
    """Missing values replaced by the last one known before them; those before the first known value stay missing."""
    rows = np.where(np.isnan(values), 0, np.arange(len(values))[:, None])
    return np.take_along_axis(values, np.maximum.accumulate(rows, 0), 0)


def _check_values(values: np.ndarray, frame: "pd.DataFrame") -> None:
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        row, column = wrong[0]
        raise SeriesError(
            f"column {frame.columns[column]!r} has no finite value at {frame.index[row]} (row {row + 1}), and {len(wrong)} are "
            "missing in all; data.impute: forward takes the last known value, where there is one before"
        )


def _logarithm(values: np.ndarray, name: str, frame: "pd.DataFrame") -> np.ndarray:
    wrong = np.flatnonzero(values <= 0)
    if len(wrong):
        raise SeriesError(
            f"data.log: column {name!r} is {values[wrong[0]]:g} at {frame.index[wrong[0]]}; allowed: above 0"
        )
    return np.log(values)


def _gaps(times: "pd.Index") -> np.ndarray | None:
    """float64 [N]: time since the row before (nanoseconds, or the unit of the numbers); None for even steps."""
    import pandas as pd

    if len(times) < 4 or (isinstance(times, pd.DatetimeIndex) and pd.infer_freq(times) is not None):
        return None
    steps = np.diff(times.to_numpy()).astype(np.float64)
    if np.ptp(steps) <= EVEN * np.median(steps):
        return None
    return np.concatenate([steps[:1], steps])
