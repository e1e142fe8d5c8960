"""What a forecast is compared with: naive, seasonal naive and exponential smoothing, each as paths.

Shapes: N rows, M targets, O origins, S paths, H horizon, P = H·M positions.
"""

import logging
import warnings

import numpy as np

from actors.environments.time_series import rows_back

logger = logging.getLogger(__name__)
MAX_RESIDUALS = 500
"""Training residuals that spread a naive forecast, evenly chosen of more."""
MIN_SEASONS = 3
"""Seasons of training rows that exponential smoothing needs to have a season."""


def naive_paths(values: np.ndarray, origins: np.ndarray, horizon: int, *, season: int, num_train: int) -> np.ndarray:
    """float64 [O, S, P]: the value a season (1: a row) before, spread by the errors that made on the training rows.

    `values` float [N, M]. Each error counts with both signs, so that the median of the paths is the naive forecast itself.
    """
    steps = np.arange(1, horizon + 1)
    back = rows_back(horizon, season)
    past = np.arange(season - 1, num_train - horizon)
    errors = values[past[:, None] + steps] - values[past[:, None] + back]
    if len(errors) > MAX_RESIDUALS:
        errors = errors[np.linspace(0, len(errors) - 1, MAX_RESIDUALS).round().astype(int)]
    spread = np.concatenate([errors, -errors])
    paths = values[origins[:, None] + back][:, None] + spread
    return paths.reshape(len(origins), len(spread), -1)


def smoothing_paths(
    values: np.ndarray, origins: np.ndarray, horizon: int, *, season: int, num_known: int, num_paths: int, seed: int
) -> np.ndarray | None:
    """float64 [O, S, P]: simulated by exponential smoothing (additive errors, damped trend, additive season) of each target.

    Parameters are fitted once, on the first `num_known` rows; at each origin the states are those after all rows up to it.
    None, with a warning, where it cannot be fitted.
    """
    columns = [
        _smoothed(values[:, target], origins, horizon, season, num_known, num_paths, seed + target)
        for target in range(values.shape[1])
    ]
    found = [paths for paths in columns if paths is not None]
    return np.stack(found, -1).reshape(len(origins), num_paths, -1) if len(found) == len(columns) else None


def _smoothed(
    values: np.ndarray, origins: np.ndarray, horizon: int, season: int, num_known: int, num_paths: int, seed: int
) -> np.ndarray | None:
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

    seasonal = season > 1 and num_known >= MIN_SEASONS * season

    def model(upto: int) -> ETSModel:
        season_options = {"seasonal": "add", "seasonal_periods": season} if seasonal else {}
        return ETSModel(values[:upto], error="add", trend="add", damped_trend=True, **season_options)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = model(num_known).fit(disp=False, maxiter=200)
            errors = np.random.default_rng(seed).standard_normal((len(origins), horizon, num_paths))
            errors *= np.sqrt(np.mean(np.square(fitted.resid)))
            simulated = [
                model(origin + 1).smooth(fitted.params).simulate(
                    horizon, anchor="end", repetitions=num_paths, random_errors=error
                )
                for origin, error in zip(origins.tolist(), errors, strict=True)
            ]  # fmt: skip
        return np.stack([np.asarray(paths).reshape(horizon, num_paths).T for paths in simulated])
    except (ValueError, np.linalg.LinAlgError) as error:
        logger.warning("exponential smoothing is left out of the comparison: %s", error)
        return None
