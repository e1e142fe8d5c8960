"""A trained sampler as an MLflow model; MLflow runs this file wherever it loads the model.

In: a table with a column `n`, sequences wanted, and optionally `seed`. Out: a table of all sequences, row after row of the
input, with their scores and log-probabilities.
"""

from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from distributed.api import load

EXPORT = "sampler"
"""Name of the model's artifact: an exported sampler (`Run.export`)."""


class SequenceSampler(PythonModel):
    """Samples sequences."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the exported sampler."""
        self._run = load(context.artifacts[EXPORT])

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """Columns sequence, score and log_policy; without a column of seeds, a row's seed is its number, from 0."""
        seeds = model_input["seed"] if "seed" in model_input else range(len(model_input))
        tables = [
            pandas.DataFrame(self._run.sample(int(n), seed=int(seed))._asdict())
            for n, seed in zip(model_input["n"], seeds, strict=True)
        ]
        return pandas.concat(tables, ignore_index=True).rename(columns={"sequences": "sequence", "scores": "score"})


set_model(SequenceSampler())
