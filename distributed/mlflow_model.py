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

    def predict(  # type: ignore[override]  # as MLflow's own, without the hints by which it would check the input anew
        self, context: PythonModelContext, model_input, params: dict[str, Any] | None = None
    ):
        """Columns sequence, score and log_policy; rows without a seed count from 0 up, so that they differ."""
        seeds = model_input.get("seed", pandas.Series(pandas.NA, model_input.index))
        tables = [
            pandas.DataFrame(self._run.sample(int(n), seed=number if pandas.isna(seed) else int(seed))._asdict())
            for number, (n, seed) in enumerate(zip(model_input["n"], seeds, strict=True))
        ]
        return pandas.concat(tables, ignore_index=True).rename(columns={"sequences": "sequence", "scores": "score"})


set_model(SequenceSampler())
