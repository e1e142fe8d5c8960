"""From Python, in a script or a notebook:

    from distributed.api import load, train

    run = train("tune_configs/tfbind8.yaml", run={"name": "first"}, environment={"noise": 0.1})
    sequences, scores, _ = run.sample(500, select="diverse", min_score=0.8)
    load("runs/first").evaluate()["excess_kl"]

What the commands do, by the same code; it takes no signals, draws no progress bar, and logs to stderr unless the program
has set up logging itself. Failures are exceptions: ConfigError for whatever the caller can put right, RunFailed for a run that
ended with an error.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distributed.backend import RunFailed
from distributed.checkpoints import load_sampler
from distributed.config import ConfigError, ExperimentConfig, resolve_config
from distributed.config_keys import validate_section
from distributed.evaluate import evaluate
from distributed.exported import DESCRIPTION_FILE, read_export, write_export
from distributed.forecast_evaluation import Forecast
from distributed.forecasts import DrawForecastConfig, draw_forecast
from distributed.progress import configure_logging
from distributed.run import named_config, to_resume, train_in_folder
from distributed.run_folder import RunFolder
from distributed.sampling import SampleConfig, Samples, sample
from distributed.training_loop import FAILED, Hooks
from learner.checkpoint import CheckpointError
from learner.gflownet import EvaluationWeights

__all__ = ["ConfigError", "ExperimentConfig", "Forecast", "Run", "RunFailed", "Samples", "load", "train"]


class Run:
    """A trained sampler: what `train` and `load` return. It holds no process or file open."""

    def __init__(self, folder: Path, config: ExperimentConfig, weights: EvaluationWeights, summary: dict[str, Any]):
        self.folder = folder
        """The run folder, or whatever path was loaded."""
        self.config = config
        """The resolved configuration."""
        self.summary = summary
        """The final figures, as in summary.json; empty where there are none."""
        self._weights = weights

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self._weights.step:,} learner steps)"

    def sample(self, n: int = 100, **options: Any) -> Samples:
        """Draw `n` sequences: named tuple of `sequences`, `scores` float32 [n] and `log_policy` float32 [n] (nats).

        `options`: the other fields of `distributed.sampling.SampleConfig`, such as seed=1, noise=False, select="diverse",
        num_drawn=10_000, min_score=0.8, gc_min=0.4, gc_max=0.6, forbid=["GAATTC"]. The same seed draws the same sequences.
        Raises ConfigError, OracleError if the oracle fails, and NoSampleError if `select` leaves nothing.
        """
        return sample(self.config, self._weights, validate_section(SampleConfig, "", {"n": n, **options}))

    def forecast(self, n: int = 100, **options: Any) -> Forecast:
        """Draw `n` paths that continue the series of a forecasting generator: named tuple of `paths` float64 [n, H, M] and more.

        `options`: the other fields of `distributed.forecasts.DrawForecastConfig`: origin="2024-06-01" (default: the last row
        of the data), seed=1, noise=False. Raises ConfigError.
        """
        return draw_forecast(self.config, self._weights, validate_section(DrawForecastConfig, "", {"n": n, **options}))

    def evaluate(self, **changes: Any) -> dict[str, float]:
        """The figures of `python -m distributed.evaluate`; `changes` of the config as in `train`.

        Raises ConfigError, OracleError if the oracle fails, and NoSampleError if no sample has a valid score.
        """
        return evaluate(resolve_config(self.config, _by_key(changes)), self._weights)

    def export(self, folder: str | os.PathLike[str]) -> Path:
        """Write the sampler into a new folder that `load` opens, here or elsewhere, and return it; raises ConfigError.

        It holds sampler.safetensors (weights), sampler.json (config, summary) and the oracle's data files. An oracle that is a
        Python function must be importable where the folder is opened.
        """
        return write_export(Path(folder), self.config, self._weights, self.summary)


def train(
    config: str | os.PathLike[str] | Mapping[str, Any] | ExperimentConfig | None = None,
    *,
    resume: str | os.PathLike[str] | None = None,
    **changes: Any,
) -> Run:
    """Train a sampler and return it; the run folder is as `python -m distributed.run` leaves it.

    `config`: path of a YAML file, its content as a dict, an ExperimentConfig, or None for the default task. `resume`: folder of
    a run to go on with instead. `changes`: sections with the keys to change (reward={"exponent": 5}), or
    **{"reward.exponent": 5}. Raises ConfigError before anything is run, and RunFailed if the run ends with an error; after an
    interrupt (KeyboardInterrupt) the folder can be resumed from its newest checkpoint.
    """
    _log_to_stderr()
    keys, hooks = _by_key(changes), Hooks(interactive=False)
    if resume is not None:
        if config is not None:
            raise ConfigError("resume takes the config of the run; give no config beside it")
        folder, summary = train_in_folder(*to_resume(Path(resume), keys), hooks)
    else:
        source = Path(config) if isinstance(config, (str, os.PathLike)) else config
        folder, summary = train_in_folder(named_config(source, keys), None, None, None, hooks)
    if summary["status"] == FAILED:
        raise RunFailed(f"{folder.path}: {summary['error']}")
    return load(folder.path)


def load(path: str | os.PathLike[str]) -> Run:
    """A trained sampler from a run folder, a checkpoint folder, a learner.pt file or an exported folder; raises ConfigError.

    Open only what you trust: it names its oracle, and a function is imported and run.
    """
    _log_to_stderr()
    path = Path(path)
    try:
        if (path / DESCRIPTION_FILE).is_file():
            return Run(path, *read_export(path))
        config, weights = load_sampler(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    return Run(path, config, weights, RunFolder(path).read_summary())


def _by_key(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, of sections and of keys that are dotted already."""
    keys: dict[str, Any] = {}
    for name, value in changes.items():
        if "." in name:
            keys[name] = value
        elif name in ExperimentConfig.model_fields and isinstance(value, Mapping):
            keys |= {f"{name}.{key}": one for key, one in value.items()}
        else:
            sections = ", ".join(ExperimentConfig.model_fields)
            raise ConfigError(f"{name}: got {value!r}; allowed: a section ({sections}) with a dict of its keys")
    return keys


def _log_to_stderr() -> None:
    if not logging.getLogger().handlers:
        configure_logging()
