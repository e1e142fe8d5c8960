"""Drawing forecasts from a trained generator: what `sample`, the API and the MLflow model share."""

import csv
from typing import TextIO

import numpy as np
from pydantic import Field

from actors.series import SeriesError
from distributed.config import ConfigError, ExperimentConfig
from distributed.evaluate import open_evaluator
from distributed.forecast_evaluation import Forecast, ForecastEvaluator
from learner.configs import StrictConfig
from learner.gflownet import EvaluationWeights

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


class DrawForecastConfig(StrictConfig):
    """How many futures are drawn, and after which row."""

    n: int = Field(100, ge=1, le=1_000_000)
    """Paths wanted."""
    origin: str | None = None
    """Time of the last known row, as the data write it; null: their last row."""
    seed: int = Field(0, ge=0)
    """Seed of the draw."""
    noise: bool = True
    """Draw with the environment's noise; false: as the policy intends."""


def draw_forecast(config: ExperimentConfig, weights: EvaluationWeights, wanted: DrawForecastConfig) -> Forecast:
    """Paths that continue the data of a trained generator; raises ConfigError for what does not fit it."""
    if config.generator.name != "forecast":
        raise ConfigError(f"generator.name {config.generator.name} draws no forecasts, but sequences: see Run.sample")
    evaluator = open_evaluator(config, weights)
    assert isinstance(evaluator, ForecastEvaluator)
    origin = _row(evaluator, wanted.origin)
    return evaluator.forecast(weights, origin, wanted.n, seed=wanted.seed, noise=wanted.noise)


def _row(evaluator: ForecastEvaluator, origin: str | None) -> int:
    series, window = evaluator.task.series, evaluator.data.window
    try:
        row = len(series) - 1 if origin is None else series.row(origin)
    except SeriesError as error:
        raise ConfigError(str(error)) from error
    if row + 1 < window:
        raise ConfigError(f"origin: {origin} has fewer than data.window ({window}) rows up to it")
    return row


def write_csv(stream: TextIO, forecast: Forecast) -> None:
    """A row a time and target: columns time, target, mean, quantiles (q05 to q95), and every path."""
    levels = {"mean": forecast.paths.mean(0)} | {
        f"q{100 * level:02.0f}": np.quantile(forecast.paths, level, axis=0) for level in QUANTILES
    }
    writer = csv.writer(stream)
    writer.writerow(["time", "target", *levels, *(f"path_{n}" for n in range(1, len(forecast.paths) + 1))])
    for step, column in np.ndindex(len(forecast.times), len(forecast.targets)):
        values = [*(level[step, column] for level in levels.values()), *forecast.paths[:, step, column]]
        writer.writerow([forecast.times[step], forecast.targets[column], *(f"{value:.8g}" for value in values)])
