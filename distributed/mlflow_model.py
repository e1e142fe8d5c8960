"""A trained sampler as an MLflow model; MLflow runs this file wherever it loads the model.

In: a table with a column `n`, sequences or paths wanted, and optionally `seed`, and of forecasts `origin`. Out: a table of all
sequences with their scores and log-probabilities, or of the values of all paths, row after row of the input.
"""

from typing import Any

import numpy as np
import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from distributed.api import Forecast, load

EXPORT = "sampler"
"""Name of the model's artifact: an exported sampler (`Run.export`)."""


class SequenceSampler(PythonModel):
    """Samples sequences, or paths of a forecast."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the exported sampler."""
        self._run = load(context.artifacts[EXPORT])

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """Columns sequence, score and log_policy, or time, target, path and value; a row's default seed is its number, from 0."""
        seeds = model_input["seed"] if "seed" in model_input else range(len(model_input))
        asked: list[dict[str, Any]] = [
            {"n": int(n), "seed": int(seed)} for n, seed in zip(model_input["n"], seeds, strict=True)
        ]
        if self._run.config.generator.name != "forecast":
            drawn = [pandas.DataFrame(self._run.sample(**one)._asdict()) for one in asked]
            return pandas.concat(drawn, ignore_index=True).rename(columns={"sequences": "sequence", "scores": "score"})
        origins = model_input["origin"] if "origin" in model_input else [None] * len(asked)
        asked = [one if pandas.isna(at) else one | {"origin": str(at)} for one, at in zip(asked, origins, strict=True)]
        return pandas.concat([_table(self._run.forecast(**one)) for one in asked], ignore_index=True)


def _table(forecast: Forecast) -> pandas.DataFrame:
    """A row for each value of each path; paths are numbered from 1."""
    path, step, target = np.indices(forecast.paths.shape).reshape(3, -1)
    times = np.array([str(time) for time in forecast.times])
    columns = {"time": times[step], "target": np.array(forecast.targets)[target], "path": path + 1}
    return pandas.DataFrame(columns | {"value": forecast.paths.ravel()})


set_model(SequenceSampler())
