"""The whole configuration of an experiment: YAML file + command line -> frozen, validated sections."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from actors.environments.sequence import EnvironmentConfig
from actors.oracles.registry import OracleConfig
from actors.oracles.tfbind8 import TFBind8Config
from actors.replay_buffer import ReplayConfig
from actors.rollout import ActorsConfig
from actors.series import DataConfig
from distributed.config_keys import DEFAULT_NAMES, validate_section, without_credentials
from distributed.stopping import StopWhenConfig
from distributed.yaml_text import MAX_CONFIG_BYTES, ConfigError, parse_yaml, read_limited
from learner.configs import AbsolutePath, StrictConfig
from learner.drakes.config import DrakesConfig, GFlowNetConfig
from learner.dynamics import DynamicsConfig
from learner.forecast import ForecastConfig
from learner.gflownet import LearnerConfig
from learner.metrics import SampleMetricsConfig
from learner.networks import MLPConfig, NetworkConfig
from learner.objectives.config import ObjectiveConfig
from learner.rewards import RewardConfig

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "tune_configs" / "tfbind8.yaml"


class RunConfig(StrictConfig):
    """What is run, where, and for how long."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run and its folder; null: made from the config's file name and the time."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of everything random."""
    backend: Literal["ray", "serial"] = "ray"
    """ray: actors on this machine or a cluster; serial: the same loop in one process, reproducible to the bit."""
    address: str | None = None
    """Ray cluster to attach to: auto, or HOST:PORT; null: start Ray on this machine."""
    num_learner_steps: int = Field(3000, ge=1)
    """Gradient steps of the policy after which the run is done; the learning rate decays towards this end."""
    max_seconds: float | None = Field(None, gt=0)
    """Wall time after which the run ends cleanly even if steps are left; null: no limit."""
    max_oracle_calls: int | None = Field(None, ge=1)
    """Sequences scored for rollout actors (num_sampled) after which the run ends cleanly; batches under way are finished, and
    the evaluation's are not counted; null: no limit."""
    stop_when: StopWhenConfig = StopWhenConfig()
    start_from: AbsolutePath | None = None
    """Run folder, checkpoint or exported sampler whose weights a new run starts from, with a fresh optimiser; null: random."""
    output_folder: Path = Path("runs")
    """Where run folders are made."""

    @field_validator("output_folder")
    @classmethod
    def _printable(cls, value: Path) -> Path:
        if not str(value).isprintable():
            raise ValueError("allowed: a path of printable characters")
        return value

    save_every_seconds: float = Field(30.0, gt=0)
    """Interval between checkpoints of learner and buffer: the most that a crash can cost."""


class EvaluationConfig(SampleMetricsConfig):
    """How often and how the sampler is judged."""

    every_steps: int = Field(250, ge=1)
    """Learner steps between evaluations."""
    exact: Literal["auto", "always", "never"] = "auto"
    """Exact law by enumeration; auto: if the space has at most `max_sequences` and the oracle is a table."""
    max_sequences: int = Field(4**10, ge=2)
    """Largest space that is enumerated."""
    kmer_size: int = Field(3, ge=1, le=8)
    """Where there is no exact law: length of the k-mers whose frequencies are compared with the target's."""


class TrackingConfig(StrictConfig):
    """Where metrics go besides the run folder."""

    mlflow: bool = True
    """Log the run to MLflow."""
    mlflow_uri: str | None = None
    """Tracking server or store; null: $MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db in this folder."""

    @field_validator("mlflow_uri")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        if value is not None and without_credentials(value) != value:
            raise ValueError(
                "no user or password is allowed here; use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return value

    experiment: str = Field("default", min_length=1, max_length=200)
    """MLflow experiment."""
    log_model: bool = True
    """Log the trained sampler as an MLflow model, from which `mlflow models predict` and `serve` sample; off in sweeps."""
    log_every_steps: int = Field(20, ge=1)
    """Learner steps between records of training metrics."""


GeneratorConfig = Annotated[GFlowNetConfig | DrakesConfig | ForecastConfig, Field(discriminator="name")]


class ExperimentConfig(StrictConfig):
    """All sections."""

    run: RunConfig = RunConfig()
    generator: GeneratorConfig = GFlowNetConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    data: DataConfig | None = None
    """Series that generator.name forecast continues; null for the other generators."""
    oracle: OracleConfig = TFBind8Config()
    reward: RewardConfig = RewardConfig()
    network: NetworkConfig = MLPConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    dynamics: DynamicsConfig = DynamicsConfig()
    learner: LearnerConfig = LearnerConfig()
    actors: ActorsConfig = ActorsConfig()
    replay: ReplayConfig = ReplayConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "ExperimentConfig":
        chosen_by_score = self.replay.replay_share > 0 and self.replay.priority_exponent > 0
        if self.dynamics.mode == "on_policy" and chosen_by_score and self.objective.uses_dynamics:
            raise ValueError(
                "dynamics.mode: on_policy goes with replay.priority_exponent: 0; outcomes chosen by their score would bias "
                "the dynamics model"
            )
        self._check_generator()
        if self.run.backend == "serial" and self.run.address is not None:
            raise ValueError("run.address goes with run.backend: ray")
        if self.run.address is not None and self.run.address.startswith("ray://"):
            raise ValueError("run.address: ray:// is not supported; start the run on a node of the cluster with 'auto'")
        return self

    def _check_generator(self) -> None:
        if (self.data is None) == (self.generator.name == "forecast"):
            raise ValueError("the section data goes with generator.name: forecast, which needs it")
        if isinstance(self.generator, DrakesConfig):
            self._check_drakes(self.generator)
        elif self.generator.name == "forecast":
            self._check_forecast()

    def _check_forecast(self) -> None:
        environment, default = self.environment, EnvironmentConfig()
        if environment.model_copy(update={"noise": default.noise}) != default:
            raise ValueError(
                "environment: of this section generator.name forecast takes only the noise; see section data"
            )
        if self.network.name != "transformer":
            raise ValueError(
                f"network.name: {self.network.name} reads no windows of a time series; allowed: transformer"
            )
        if self.replay.offline_source != "none":
            raise ValueError(
                "replay.offline_source: generator.name forecast has none; true futures join by their weights"
            )
        if self.evaluation.exact == "always":
            raise ValueError(
                "evaluation.exact: got 'always'; forecasts are judged on the test rows; allowed: auto, never"
            )

    def _check_drakes(self, generator: DrakesConfig) -> None:
        environment = self.environment
        if environment.alphabet != "ACGT" or environment.variable_length or environment.noise:
            raise ValueError(
                "generator.name drakes draws DNA of one length without noise: environment.alphabet ACGT, variable_length "
                f"false, noise 0; got {environment.alphabet}, {environment.variable_length}, {environment.noise}"
            )
        if self.replay.offline_source == "none":
            raise ValueError("generator.name drakes is pretrained: replay.offline_source must not be none")
        if self.run.num_learner_steps < generator.pretraining.num_steps:
            raise ValueError(
                f"run.num_learner_steps: {self.run.num_learner_steps} are fewer than the first "
                f"generator.pretraining.num_steps {generator.pretraining.num_steps}"
            )

    def to_yaml(self) -> str:
        """The resolved configuration, in the form of a config file."""
        absent = {"data"} if self.data is None else set()
        return yaml.safe_dump(self.model_dump(mode="json", exclude=absent), sort_keys=False)


ConfigSource = Path | Mapping[str, Any] | ExperimentConfig | None
"""A YAML file, its content, a configuration, or None for the default task."""


def resolve_config(source: ConfigSource, changes: Mapping[str, Any]) -> ExperimentConfig:
    """The configuration in `source`, changed by `changes` (dotted key -> value); raises ConfigError as `load_config` does."""
    if isinstance(source, ExperimentConfig):
        values: dict[str, Any] = source.model_dump(mode="json")
    elif source is None or isinstance(source, Path):
        values = read_yaml(source or DEFAULT_CONFIG)
    else:
        values = dict(source)
    return validate(apply_values(values, changes))


def load_config(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> ExperimentConfig:
    """The configuration in the YAML file `path`, changed by `overrides` (("section.key", "value as YAML"), ...).

    Raises ConfigError for a missing or malformed file, an unknown key, a wrong type, or a value out of range.
    """
    return resolve_config(path, parse_values(overrides))


def read_yaml(path: Path, *, sections: bool = True) -> dict[str, Any]:
    """The mapping in a YAML file, of sections unless told otherwise, read safely; raises ConfigError."""
    try:
        text = read_limited(path, MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    content = parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict) or (sections and not all(isinstance(v, dict) for v in content.values())):
        raise ConfigError(f"{path}: a config is a mapping of sections ({', '.join(ExperimentConfig.model_fields)})")
    return content


def apply_overrides(values: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A copy of `values` with dotted keys replaced.

    Choosing another `name` of the sections oracle and network discards what the file says of the old one.
    """
    return apply_values(values, parse_values(overrides))


def parse_values(overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Dotted key -> value, of the texts that a command was given; raises ConfigError."""
    return {key: parse_yaml(text, f"--{key}") for key, text in overrides}


def apply_values(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` with dotted keys replaced by the values in `changes`, as `apply_overrides` does with texts."""
    values = copy.deepcopy(values)
    for key, value in sorted(changes.items(), key=lambda item: not item[0].endswith(".name")):
        *parents, last = key.split(".")
        if not parents:
            raise ConfigError(f"--{key}: unknown option; config keys are given as --section.key value")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--{key}: {parent} is not a section")
        if last == "name" and parents[-1] in DEFAULT_NAMES and node.get("name", DEFAULT_NAMES[parents[-1]]) != value:
            node.clear()
        node[last] = value
    return values


def validate(values: dict[str, Any]) -> ExperimentConfig:
    """Raises ConfigError with one line for each fault."""
    return validate_section(ExperimentConfig, "", values)
