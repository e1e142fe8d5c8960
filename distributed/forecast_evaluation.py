"""Judging forecasts: rolling origins on rows that training never saw, beside naive, seasonal naive and exponential smoothing.

Shapes: O origins, S paths, P positions, N rows, M targets, H horizon.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from actors.environments.sequence import SequenceEnvironment
from actors.environments.time_series import PathScorer, Split, Windows
from actors.forecasting import draw_paths
from actors.oracles.base import Oracle
from distributed.config import ExperimentConfig
from distributed.evaluation import ExactLaw
from distributed.experiment import derive_seed, make_policy
from distributed.forecast_baselines import naive_paths, smoothing_paths
from learner.dynamics import DynamicsModel
from learner.flat import FlatParameters
from learner.forecast import ForecastConfig
from learner.forecast_metrics import forecast_metrics, mase_scale
from learner.gflownet import EvaluationWeights

MAX_ORIGINS, MAX_INTERIM_ORIGINS = 200, 50
"""Origins at which a forecast is judged, at even distances, at the end and at intervals."""
CHUNK = 16_384
"""Paths drawn at once."""


class Forecast(NamedTuple):
    """Sampled futures after one row of a series, on the scale of the user's file."""

    targets: tuple[str, ...]
    """M columns."""
    times: Sequence[Any]
    """H dates or numbers."""
    paths: np.ndarray
    """float64 [S, H, M]."""
    actual: np.ndarray
    """float64 [H, M]; NaN where the future is not known yet."""
    past_times: Sequence[Any]
    """W dates or numbers: the window that is continued."""
    past: np.ndarray
    """float64 [W, M]."""


class ForecastEvaluator:
    """Evaluates weights of a forecasting policy; the counterpart of `Evaluator`."""

    def __init__(self, config: ExperimentConfig, environment: SequenceEnvironment, oracle: Oracle):
        assert isinstance(config.generator, ForecastConfig)
        assert isinstance(oracle, PathScorer)
        self.config, self.environment, self.oracle = config, environment, oracle
        self.generator: ForecastConfig = config.generator
        self.task, self.data = oracle.task, oracle.task.config
        self.policy = make_policy(config, environment, self.task).eval()
        self._policy_weights = FlatParameters(self.policy)
        self._dynamics_weights = FlatParameters(
            DynamicsModel(environment.space, config.dynamics.network, self.task.shape)
        )
        self._history = self.task.history()
        self._scale = mase_scale(self._history[: self.task.num_train], self.data.season)
        self._shown: Forecast | None = None

    def load(self, weights: EvaluationWeights) -> None:
        """Take over the weights to judge; raises ValueError if they belong to other networks."""
        self._policy_weights.load(weights.policy)
        self._dynamics_weights.load(weights.dynamics)

    def paths(
        self, weights: EvaluationWeights, windows: Windows, count: int, *, seed: int, noise: bool = True
    ) -> np.ndarray:
        """float64 [O, S, P]: `count` futures of each window, on the scale of the user's file."""
        self.load(weights)
        process = self.environment.noise if noise else self.environment.intact
        index, rng = np.repeat(np.arange(len(windows)), count), np.random.default_rng(seed)
        within = rng if self.data.bin_value == "uniform" else None
        parts = []
        for start in range(0, len(index), CHUNK):
            chosen = index[start : start + CHUNK]
            first = int(chosen[0])
            inputs = windows.inputs[first : int(chosen[-1]) + 1]
            drawn = draw_paths(self.policy, self.environment, process, inputs, chosen - first, rng)
            parts.append(self.task.to_units(drawn.tokens, windows.centres[chosen], within))
        return np.concatenate(parts).reshape(len(windows), count, -1)

    def forecast(self, weights: EvaluationWeights, origin: int, count: int, *, seed: int, noise: bool) -> Forecast:
        """`count` futures after row `origin`, which may be the last one."""
        windows = self.task.windows(np.array([origin]))
        return self._forecast(windows, self.paths(weights, windows, count, seed=seed, noise=noise))

    def _forecast(self, windows: Windows, paths: np.ndarray) -> Forecast:
        """Of the last window, of whose `paths` [O, S, P] the last belong to it."""
        origin, horizon = int(windows.origins[-1]), self.data.horizon
        known = slice(origin + 1 - self.data.window, origin + 1)
        shape = (horizon, len(self.task.targets))
        return Forecast(
            targets=self.data.target_names,
            times=self.task.series.next_times(origin, horizon),
            paths=paths[-1].reshape(-1, *shape),
            actual=self.task.original(windows.actual[-1]).reshape(shape),
            past_times=self.task.series.times[known],
            past=self._history[known],
        )

    def sample_metrics(self, weights: EvaluationWeights) -> tuple[dict[str, float], None]:
        """Figures on the test rows beside the baselines', and on the validation rows."""
        metrics = self._validation(weights, MAX_ORIGINS)
        windows = self.task.split("test", MAX_ORIGINS)
        paths = self.paths(weights, windows, self.generator.num_paths, seed=self._seed("test"))
        self._shown = self._forecast(windows, paths)
        metrics |= self.figures(paths, windows)
        for name, baseline in self._baselines(windows).items():
            metrics |= {f"{key}_{name}": value for key, value in self.figures(baseline, windows).items()}
        return metrics | self.task.binning_report() | {"num_test_origins": len(windows)}, None

    def interim(self, weights: EvaluationWeights) -> dict[str, float]:
        """Figures on the validation rows: the test rows are looked at once, at the end."""
        return self._validation(weights, MAX_INTERIM_ORIGINS)

    def _validation(self, weights: EvaluationWeights, most: int) -> dict[str, float]:
        windows = self.task.split("validation", most)
        paths = self.paths(weights, windows, self.generator.num_paths, seed=self._seed("validation"))
        return {f"validation_{name}": value for name, value in self.figures(paths, windows).items()}

    def _seed(self, split: Split) -> int:
        return derive_seed(self.config.run.seed, f"evaluation_{split}")

    def figures(self, paths: np.ndarray, windows: Windows) -> dict[str, float]:
        """Figures of `paths` [O, S, P]; of several targets, in units of each one's seasonal-naive error in training."""
        scale = np.tile(self._scale, self.data.horizon)
        unit = np.ones_like(scale) if len(self.task.targets) == 1 else scale
        return forecast_metrics(paths, self.task.original(windows.actual), scale, unit)

    def _baselines(self, windows: Windows) -> dict[str, np.ndarray]:
        """float64 [O, S, P] of each baseline."""
        values, origins, horizon, season = self._history, windows.origins, self.data.horizon, self.data.season
        found: dict[str, np.ndarray | None] = {
            "naive": naive_paths(values, origins, horizon, season=1, num_train=self.task.num_train),
            "seasonal_naive": naive_paths(values, origins, horizon, season=season, num_train=self.task.num_train),
            "ets": smoothing_paths(
                values, origins, horizon, season=season, num_known=self.task.num_known,
                num_paths=self.generator.num_paths, seed=self._seed("test"),
            ),
        }  # fmt: skip
        return {name: paths for name, paths in found.items() if paths is not None}

    def draw_plots(self, folder: Path, law: ExactLaw | None) -> None:
        """The forecast at the last test origin, beside what came; raises OSError."""
        if self._shown is not None:
            from distributed import plots

            plots.fan_chart(self._shown, folder / "forecast.png")
