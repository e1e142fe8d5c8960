"""How good sampled forecasts are. Shapes: S paths, O forecasts (origins), P positions."""

import numpy as np


def crps(paths: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score float64 [O, P] of `paths` float [O, S, P] beside `actual` [O, P]; units of the series.

    E|X - y| - E|X - X'| / 2 of the law that gives each path the weight 1/S (Gneiting & Raftery 2007, eq. 21), in
    S log S: with sorted x_1..x_S, E|X - X'| = 2/S² Σ (2i - S - 1) x_i.
    """
    ordered, count = np.sort(paths, 1), paths.shape[1]
    ranks = 2 * np.arange(1, count + 1) - count - 1
    spread = 2 * np.einsum("s,osp->op", ranks, ordered) / count**2
    return np.abs(paths - actual[:, None]).mean(1) - spread / 2


def coverage(paths: np.ndarray, actual: np.ndarray, level: float) -> float:
    """Share of `actual` [O, P] inside the central interval of probability `level` of `paths` [O, S, P]."""
    low, high = np.quantile(paths, [(1 - level) / 2, (1 + level) / 2], axis=1)
    return float(((low <= actual) & (actual <= high)).mean())


def mase_scale(values: np.ndarray, season: int) -> np.ndarray:
    """float64 [M]: mean |y_t - y_{t-season}| of training values [N, M], what MASE divides by (Hyndman & Koehler 2006)."""
    return np.abs(values[season:] - values[:-season]).mean(0)


def forecast_metrics(paths: np.ndarray, actual: np.ndarray, scale: np.ndarray, unit: np.ndarray) -> dict[str, float]:
    """Figures of `paths` float [O, S, P] beside `actual` [O, P].

    `mae` and `mase` judge the median of the paths, `rmse` their mean; `mase` divides by `scale` [P], the others by `unit`
    [P] (ones: the series' own units).
    """
    median, mean = np.median(paths, 1), paths.mean(1)
    return {
        "crps": float((crps(paths, actual) / unit).mean()),
        "mae": float((np.abs(median - actual) / unit).mean()),
        "rmse": float(np.sqrt((((mean - actual) / unit) ** 2).mean())),
        "mase": float((np.abs(median - actual) / scale).mean()),
        "coverage_90": coverage(paths, actual, 0.9),
        "coverage_50": coverage(paths, actual, 0.5),
    }
