"""Forecasting as an environment: windows of a series, their futures as tokens, and the score of a path.

A state is a window and the values forecast so far; an action is the bin of the next value, and the noise may move it to a
neighbouring one. All statistics (normalisation, edges of bins) come from the training rows.

Shapes: N rows, F features, W window, H horizon, M targets, P = H·M positions (all targets of a step, then the next step),
K bins, n windows.
"""

import string
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from actors.environments.noise import NeighbourSubstitution
from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.series import GAP, DataConfig, Series, SeriesError, load_series
from learner.binning import Bins, make_bins
from learner.forecast import ErrorName, ForecastData, step_errors
from learner.networks.context import ContextShape

Split = Literal["train", "validation", "test"]
LETTERS = (string.ascii_letters + string.digits + "+-")[:64]
"""Names of bins in messages."""


def path_environment(data: DataConfig, noise: float) -> SequenceEnvironment:
    """Strings of P bins, which the noise moves to a neighbour with that probability."""
    config = EnvironmentConfig(alphabet=LETTERS[: data.num_bins], length=data.num_positions, noise=noise)
    return SequenceEnvironment(config, NeighbourSubstitution(noise))


@dataclass(frozen=True)
class Windows:
    """n windows and, where the series knows them, their futures."""

    origins: np.ndarray
    """int64 [n]: last row of each window."""
    inputs: np.ndarray
    """float32 [n, W, F]: what the networks see, normalised."""
    centres: np.ndarray
    """float64 [n, P]: what is subtracted from the future values."""
    actual: np.ndarray
    """float64 [n, P]: future values in the series' units (log scale where `data.log` asks for it); NaN: not known yet."""
    futures: np.ndarray
    """float32 [n, P]: the same, normalised."""

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, rows: slice | np.ndarray) -> "Windows":
        """Some of the windows."""
        parts = (self.origins, self.inputs, self.centres, self.actual, self.futures)
        return Windows(*(part[rows] for part in parts))


class TimeSeriesTask:
    """A series cut into windows; knows the way from tokens to values and back."""

    def __init__(self, config: DataConfig, series: Series | None = None):
        """Loads the series unless it is given; raises SeriesError for what cannot be split, normalised or binned."""
        self.config, self.series = config, load_series(config) if series is None else series
        self.targets = [self.series.column(name) for name in config.target_names]
        self._logged = np.array([name in config.log for name in config.target_names] * config.horizon)
        self.num_train = int(len(self.series) * config.train_share)
        self.num_known = int(len(self.series) * (config.train_share + config.validation_share))
        """Rows of training, and of training and validation."""
        self._check()
        origins = self.origins("train")
        raw, known = self._raw_inputs(origins), self._future_values(origins) - self._centres(origins)
        self._input_mean, self._input_scale = raw.mean((0, 1)), raw.std((0, 1))
        self._input_scale[self._input_scale == 0] = 1.0  # a window of one row, less its last; even steps so far
        self._mean, self._scale = known.mean(0), known.std(0)
        if (self._scale == 0).any():
            raise SeriesError(
                f"column {self._name(int(np.argmin(self._scale)))!r} has the same future in every training window"
            )
        self.bins: Bins = make_bins((known - self._mean) / self._scale, config.num_bins, config.bins, config.bin_margin)

    @property
    def shape(self) -> ContextShape:
        """Of a window."""
        return ContextShape(self.config.window, len(self.series.columns))

    def _check(self) -> None:
        config, rows = self.config, len(self.series)
        for split in ("train", "validation", "test"):
            if not len(self.origins(split)):
                share = {"train": "train_share", "validation": "validation_share"}.get(split, "shares that are left")
                raise SeriesError(
                    f"data: {rows} rows are too few: no {split} window has room for window {config.window} and horizon "
                    f"{config.horizon}; give more rows, or change data.window, data.horizon or data.{share}"
                )
        for place, name in enumerate(self.series.columns):
            if name != GAP and np.ptp(self.series.values[: self.num_train, place]) == 0:
                raise SeriesError(
                    f"column {name!r} is constant ({self.series.values[0, place]:g}) in the {self.num_train} training rows; "
                    "leave it out by data.features"
                )

    def _name(self, position: int) -> str:
        return self.config.target_names[position % len(self.targets)]

    def origins(self, split: Split) -> np.ndarray:
        """int64 [n]: last rows of the windows whose futures lie wholly in a split; windows may reach back before it."""
        window, horizon = self.config.window, self.config.horizon
        if split == "train":
            return np.arange(window - 1, self.num_train - horizon, self.config.stride)
        begin, end = (self.num_train, self.num_known) if split == "validation" else (self.num_known, len(self.series))
        return np.arange(max(window, begin) - 1, end - horizon)

    def windows(self, origins: np.ndarray) -> Windows:
        """The windows that end at rows `origins` int [n]; only their futures depend on later rows."""
        inputs = (self._raw_inputs(origins) - self._input_mean) / self._input_scale
        actual, centres = self._future_values(origins), self._centres(origins)
        futures = (actual - centres - self._mean) / self._scale
        return Windows(origins, inputs.astype(np.float32), centres, actual, futures.astype(np.float32))

    def split(self, split: Split, most: int | None = None) -> Windows:
        """The windows of a split; of many, `most` at even distances."""
        origins = self.origins(split)
        if most is not None and len(origins) > most:
            origins = origins[np.linspace(0, len(origins) - 1, most).round().astype(np.int64)]
        return self.windows(origins)

    def learner_data(self) -> ForecastData:
        """The training windows."""
        train = self.split("train")
        tokens = self.bins.encode((train.actual - train.centres - self._mean) / self._scale)
        return ForecastData(train.inputs, train.futures, tokens, self.bins.values)

    def to_units(self, tokens: np.ndarray, centres: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """float64 [n, P]: values that paths of `tokens` int [n, P] stand for; each in its bin at random, if `rng` is given."""
        uniforms = None if rng is None else rng.random(tokens.shape)
        normalised = self.bins.decode(tokens) if uniforms is None else self.bins.decode_within(tokens, uniforms)
        return self.original(normalised * self._scale + self._mean + centres)

    def original(self, values: np.ndarray) -> np.ndarray:
        """Values float [.., P], or [.., M] of one step, on the scale of the user's file: logarithms undone."""
        logged = self._logged[: values.shape[-1]]
        return np.where(logged, np.exp(np.where(logged, values, 0.0)), values)

    def history(self) -> np.ndarray:
        """float64 [N, M]: the targets on the scale of the user's file."""
        return self.original(self.series.values[:, self.targets])

    def binning_report(self) -> dict[str, float]:
        """Round-trip error of the bins (mean absolute, normalised units), and the share of test values beyond them."""
        report: dict[str, float] = {}
        for split in ("train", "test"):
            found = self.split(split)
            normalised = (found.actual - found.centres - self._mean) / self._scale
            report[f"binning_error_{split}"] = self.bins.round_trip_error(normalised)
            report[f"beyond_bins_{split}"] = self.bins.share_beyond(normalised)
        return report

    def _raw_inputs(self, origins: np.ndarray) -> np.ndarray:
        rows = origins[:, None] + np.arange(-self.config.window + 1, 1)
        inputs = self.series.values[rows]
        if self.config.centre != "none":
            inputs = inputs - np.where(np.array(self.series.columns) == GAP, 0.0, inputs[:, -1:])
        return inputs

    def _future_values(self, origins: np.ndarray) -> np.ndarray:
        rows = origins[:, None] + np.arange(1, self.config.horizon + 1)
        values = self.series.values[np.minimum(rows, len(self.series) - 1)][..., self.targets]
        return np.where((rows < len(self.series))[..., None], values, np.nan).reshape(len(origins), -1)

    def _centres(self, origins: np.ndarray) -> np.ndarray:
        if self.config.centre == "none":
            return np.zeros((len(origins), self.config.num_positions))
        back = rows_back(self.config.horizon, self.config.season if self.config.centre == "season" else 1)
        return self.series.values[origins[:, None] + back][..., self.targets].reshape(len(origins), -1)


def rows_back(horizon: int, season: int) -> np.ndarray:
    """int64 [H]: of each step ahead, the known row whole seasons before it, counted from the last: 1 - season .. 0, repeated."""
    steps = np.arange(1, horizon + 1)
    return steps - season * -(-steps // season)


class PathScorer:
    """The oracle of forecasts: exp(-err) of a path beside the realised future of its training window."""

    enumerable: bool = False
    reference: np.ndarray | None = None

    def __init__(self, task: TimeSeriesTask, error: ErrorName):
        self.task, self._error = task, error
        self._futures = task.split("train").futures

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float32 [B]: exp(-err), of `tokens` int [B, 1 + P]: the number of a training window, and a path that continues it."""
        values = torch.from_numpy(self.task.bins.decode(tokens[:, 1:]))
        errors = step_errors(values, torch.from_numpy(self._futures[tokens[:, 0]]), self._error)
        return errors.sum(1).neg().exp().numpy()

    def close(self) -> None:
        """Nothing to release."""
