"""A sweep: the section `sweep` of its YAML file, the base experiment in the others, and its folder."""

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from distributed.config import ConfigError, ExperimentConfig, apply_values, read_yaml, validate
from distributed.config_keys import validate_section
from distributed.experiment import derive_seed
from distributed.search_space import Domain, draw_points
from learner.configs import StrictConfig

SWEEP_FILE = "sweep.yaml"
FIXED_FOR_PBT = (
    "run.", "network.", "dynamics.network", "environment.", "oracle.", "tracking.", "replay.capacity", "learner.device",
    "actors.num_", "actors.learner_", "actors.rollout_", "actors.max_rollout", "objective.name", "objective.dynamics",
    "objective.backward", "objective.lookahead", "objective.log_z",
)  # fmt: skip
"""Beginnings of keys on which the form of a checkpoint, the reservation or the place in MLflow depend."""


class SchedulerConfig(StrictConfig):
    """Which trials are stopped early, or changed while they run."""

    name: Literal["fifo", "asha", "median", "pbt"] = "fifo"
    """fifo: none; asha: successive halving; median: those worse than the median of the others; pbt: population-based
    training, in which the worst trials go on from checkpoints of the best with changed values."""
    grace_steps: int | None = Field(None, ge=1)
    """asha, median: learner steps that every trial gets; null: one interval of evaluation."""
    reduction_factor: float = Field(3.0, gt=1, le=100)
    """asha: at each rung the best 1/this go on."""
    perturbation_steps: int | None = Field(None, ge=1)
    """pbt: learner steps between changes; null: a quarter of the run."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """pbt: the worst share copies from the best share."""


class SweepConfig(StrictConfig):
    """What is varied, and how the trials are chosen, run and judged."""

    space: dict[str, Domain] = Field(min_length=1)
    """Config key -> its values."""
    metric: str | None = None
    """Figure by which trials are compared; null: excess_kl, or sampled_reverse_kl where there is no exact law."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""
    num_samples: int = Field(8, ge=1, le=100_000)
    """Points drawn from the space; with grids, how often the whole grid is run."""
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    """Each point is run with each of these seeds, and judged by their median; null: run.seed alone."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials that run at a time; null: as many as there is room for."""
    search: Literal["random", "optuna", "hyperopt"] = "random"
    """How points are chosen; random includes grids."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """Early stopping."""
    trial_num_cpus: float | None = Field(None, gt=0)
    """CPU share that Ray reserves for the process that drives a trial, besides what its actors reserve; null: 0.25, or 1
    with run.backend serial, where that process does everything."""
    max_failures: int = Field(0, ge=0)
    """How often a trial that failed is started anew from its last checkpoint."""

    @model_validator(mode="after")
    def _consistent(self) -> "SweepConfig":
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each may be listed once")
        if "run.seed" in self.space:
            raise ValueError("space: run.seed is varied by sweep.seeds")
        self._check_search()
        if self.scheduler.name == "pbt":
            self._check_pbt()
        return self

    def _check_search(self) -> None:
        if self.search == "random":
            return
        if importlib.util.find_spec(self.search) is None:  # the package is called like the search
            raise ValueError(f"search: {self.search} is not installed; run: pip install {self.search}")
        for key, domain in self.space.items():
            if domain.kind == "grid":
                raise ValueError(f"space: {key} is a grid, which search: {self.search} cannot follow; allowed: choice")

    def _check_pbt(self) -> None:
        if self.search != "random":
            raise ValueError("scheduler: pbt chooses values itself; allowed with it: search: random")
        if self.seeds is not None and len(self.seeds) > 1:
            raise ValueError("scheduler: pbt mixes trials, so seeds cannot be compared; allowed with it: one seed")
        if self.max_concurrent is not None:
            raise ValueError(
                "max_concurrent: with scheduler: pbt all trials take turns in the room that there is; allowed: null"
            )
        for key, domain in self.space.items():
            if domain.when:
                raise ValueError(f"space: {key} has a condition; scheduler: pbt changes keys without")
            if key.startswith(FIXED_FOR_PBT):
                raise ValueError(
                    f"space: {key} cannot change while a trial runs; allowed with scheduler: pbt: keys that do not begin "
                    f"with one of {', '.join(FIXED_FOR_PBT)}"
                )


@dataclass(kw_only=True)
class Sweep:
    """A sweep and its folder."""

    key: str
    name: str
    folder: Path
    config: SweepConfig
    base: dict[str, Any]
    """The base experiment."""
    metric: str
    """`config.metric`, or what it is where none is given."""
    mlflow_uri: str
    """The store, also for --resume from elsewhere."""
    working_directory: Path
    """To which relative paths of the experiment refer."""

    @cached_property
    def experiment(self) -> ExperimentConfig:
        """The base experiment, validated."""
        return validate(apply_values(self.base, {"tracking.mlflow_uri": self.mlflow_uri}))

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        """With search: random, the points; raises ConfigError if one is not valid."""
        return draw_points(self.base, self.config.space, self.config.num_samples, self.rng("points"))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of every point."""
        return self.config.seeds or (self.experiment.run.seed,)

    def to_dict(self) -> dict[str, Any]:
        """What --resume needs."""
        section = self.config.model_dump(mode="json", exclude_unset=True)
        where = {"mlflow_uri": self.mlflow_uri, "working_directory": str(self.working_directory)}
        return {"key": self.key, "name": self.name, "metric": self.metric, **where, "sweep": section, "base": self.base}

    def rng(self, purpose: str) -> np.random.Generator:
        """Random numbers that a resumed sweep draws again."""
        return np.random.default_rng(derive_seed(self.experiment.run.seed, purpose))


def load_sweep(folder: Path) -> Sweep:
    """The sweep in an existing folder; raises ConfigError."""
    file = folder / SWEEP_FILE
    if not file.is_file():
        raise ConfigError(f"{folder}: not the folder of a sweep (it has no {SWEEP_FILE})")
    values = read_yaml(file, sections=False)
    try:
        for key in ("key", "name", "metric", "mlflow_uri", "working_directory"):
            if not isinstance(values[key], str) or not values[key].isprintable():
                raise TypeError(f"{key}: allowed is a text")
        if not isinstance(values["base"], dict):
            raise TypeError("base: allowed is a mapping of sections")
        config = validate_section(SweepConfig, "sweep", values["sweep"])
        return Sweep(
            key=values["key"], name=values["name"], folder=folder.absolute(), config=config, base=values["base"],
            metric=values["metric"], mlflow_uri=values["mlflow_uri"], working_directory=Path(values["working_directory"]),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged ({error})") from error
