"""Forecasts of co2 and sunspots by the shipped configs, three seeds: CRPS beside the baselines', and coverage."""

import statistics
import tempfile
from pathlib import Path

from tests.benchmarks.runs import run

CONFIGS = Path(__file__).parents[2] / "tune_configs"
FIGURES = (
    "crps",
    "mae",
    "rmse",
    "mase",
    "coverage_90",
    "validation_crps",
    "validation_coverage_90",
    "wall_seconds",
    "cpu_seconds",
)
BASELINES = ("crps_naive", "crps_seasonal_naive", "crps_ets", "coverage_90_seasonal_naive", "coverage_90_ets")


def forecast(quick: bool) -> dict[str, float]:
    """Median, least and largest of each figure over the seeds; baselines once, for they have no seed of their own."""
    extra = ["--run.num_learner_steps", "20"] if quick else []
    figures: dict[str, float] = {}
    for name in ("co2", "sunspots"):
        config = str(CONFIGS / f"forecast_{name}.yaml")
        with tempfile.TemporaryDirectory() as folder:
            results = [
                run(f"seed{seed}", config, "--run.backend", "serial", "--run.seed", str(seed), *extra, folder=folder)
                for seed in range(1 if quick else 3)
            ]
        for key in FIGURES:
            values = [result[key] for result in results]
            figures |= {f"{name}_{key}": statistics.median(values)}
            figures |= {f"{name}_{key}_least": min(values), f"{name}_{key}_most": max(values)}
        figures |= {f"{name}_{key}": results[0][key] for key in BASELINES}
        worst = max(result["crps"] for result in results)
        figures[f"{name}_worst_gain_on_seasonal_naive"] = 1 - worst / results[0]["crps_seasonal_naive"]
    return figures
