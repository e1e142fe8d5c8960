"""The whole configuration of an experiment: YAML file + command line -> frozen, validated sections."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from actors.environments.sequence import EnvironmentConfig
from actors.oracles.registry import OracleConfig
from actors.oracles.tfbind8 import TFBind8Config
from actors.replay_buffer import ReplayConfig
from actors.rollout import ActorsConfig
from actors.series import DataConfig
from learner.configs import StrictConfig
from learner.drakes.config import DrakesConfig, GFlowNetConfig
from learner.dynamics import DynamicsConfig
from learner.forecast import ForecastConfig
from learner.gflownet import LearnerConfig
from learner.metrics import SampleMetricsConfig
from learner.networks import MLPConfig, NetworkConfig
from learner.objectives.config import ObjectiveConfig
from learner.rewards import RewardConfig

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "tune_configs" / "tfbind8.yaml"
DEFAULT_NAMES = {"oracle": "tfbind8", "network": "mlp", "generator": "gflownet"}
MAX_CONFIG_BYTES = 1_000_000
MAX_DEPTH = 50
"""Mappings and lists of a config within each other."""
MAX_DIGITS = 100
"""Characters of an integer, which may be binary."""
MAX_FAULTS, MAX_SHOWN = 20, 200
"""Faults that a message names, and characters of a faulty value that it repeats."""

Section = TypeVar("Section", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be run; each line of the message names a key, what was given and what is allowed."""


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


def load_config(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> ExperimentConfig:
    """The configuration in the YAML file `path`, changed by `overrides` (("section.key", "value as YAML"), ...).

    Raises ConfigError for a missing or malformed file, an unknown key, a wrong type, or a value out of range.
    """
    return validate(apply_overrides(read_yaml(path), overrides))


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


def read_limited(path: Path, limit: int) -> str:
    """The text of a file; raises OSError, or ValueError if it has more than `limit` bytes or is no UTF-8."""
    with open(path, "rb") as file:
        content = file.read(limit + 1)  # of a device there is no size to be asked for
    if len(content) > limit:
        raise ValueError(f"larger than {limit:,} bytes")
    return content.decode("utf-8")


class _ConfigLoader(yaml.SafeLoader):
    """Reads plain values only, with nothing that grows beyond its text or that is lost in silence."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        place = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*) are not allowed: write the value again", place)
        if self.depth == MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"at most {MAX_DEPTH} levels are allowed", place)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key_node.start_mark)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node) if len(node.value) <= MAX_DIGITS else 2**63
        if abs(number) >= 2**63:
            raise yaml.constructor.ConstructorError(None, None, "allowed are integers of 64 bits", node.start_mark)
        return number


_ConfigLoader.add_constructor("tag:yaml.org,2002:int", _ConfigLoader.construct_integer)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, read safely; raises ConfigError naming `where`."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_CONFIG_BYTES:,} bytes")
    try:
        return _ConfigLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).replace(' in "<unicode string>",', " at").split())
        raise ConfigError(f"{where}: not valid YAML ({reason})") from error


def apply_overrides(values: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A copy of `values` with dotted keys replaced.

    Choosing another `name` of the sections oracle and network discards what the file says of the old one.
    """
    parsed = {key: parse_yaml(text, f"--{key}") for key, text in overrides}
    return apply_values(values, parsed)


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


def validate_section(model: type[Section], name: str, values: Any) -> Section:
    """`values` as a `model`, whose keys messages name with `name` before them; raises ConfigError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        prefix = f"{name}." if name else ""
        found = error.errors()
        faults = "\n".join(prefix + _explain(fault, values, model) for fault in found[:MAX_FAULTS])
        if len(found) > MAX_FAULTS:
            faults += f"\nand {len(found) - MAX_FAULTS:,} more"
        raise ConfigError(without_credentials(faults)) from error


def without_credentials(text: str) -> str:
    """`text` with the user part of every address in it masked, and values of its query that look like secrets."""
    text = re.sub(r"://([^/\s]*|[^/@\s]*:[^\s]*)@", "://***@", text)
    return re.sub(r"(?i)([?&][a-z_-]*(?:password|passwd|token|secret|key)=)[^&\s'\"]+", r"\1***", text)


def _explain(fault: ErrorDetails, values: dict[str, Any], model: type[BaseModel]) -> str:
    location = [str(part) for part in fault["loc"]]
    for number in range(len(location) - 1, 0, -1):
        if location[number - 1] in DEFAULT_NAMES:
            location.pop(number)  # the tag of the union is not part of the key
    key = ".".join(shortened(part) for part in location if "[" not in part)  # nor are the members of a union of types
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        section = _section_model(location[:-1], values, model)
        return f"{key}: unknown key; allowed: {', '.join(section.model_fields) if section else 'see --help'}"
    if fault["type"] == "union_tag_invalid":
        return f"{key}.name: got {shortened(repr(fault['ctx']['tag']))}; allowed: {fault['ctx']['expected_tags']}"
    if fault["type"] == "union_tag_not_found":
        return f"{key}.name: missing or null; allowed: a name"
    if fault["type"] == "missing":
        return f"{key}: missing; it has no default"
    if fault["type"] == "value_error" and isinstance(fault["input"], dict):
        return f"{key}: {message}" if key else message
    return f"{key}: got {shortened(repr(fault['input']))}; {message[:1].lower()}{message[1:]}"


def shortened(text: str) -> str:
    """`text`, of a long one both ends."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} … {text[-MAX_SHOWN // 2 :]}"


def _section_model(location: list[str], values: dict[str, Any], model: type[BaseModel]) -> type[BaseModel] | None:
    node: dict[str, Any] = values
    current = model
    for name in location:
        node = node.get(name, {})
        models = _models_of(current.model_fields[name].annotation) if name in current.model_fields else []
        tagged = [m for m in models if node.get("name") in (None, *_literals(m))]
        if not tagged:
            return None
        current = tagged[0]
    return current


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_of(part)]


def _literals(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("name")
    return getattr(field.annotation, "__args__", (None,)) if field else (None,)


def describe_fields(
    model: type[BaseModel] = ExperimentConfig, prefix: str = "", defaults: BaseModel | None = None
) -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of every config field, for help texts; `defaults`: an instance that holds them."""
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True) if defaults is None else getattr(defaults, name)
        inner = _models_of(field.annotation)
        if inner:
            place = f"{prefix}{name}.KEY." if get_origin(field.annotation) is dict else f"{prefix}{name}."
            for part in inner:
                tag = f" [{_literals(part)[0]}]" if len(inner) > 1 else ""
                held = default if isinstance(default, part) else None
                for key, shown, text in describe_fields(part, place, held):
                    yield key, shown, text + tag
        else:
            required = field.is_required() and defaults is None
            shown = "required" if required else yaml.safe_dump(_plain(default)).split("\n...")[0].strip()
            yield f"{prefix}{name}", shown, " ".join((field.description or "").split())


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
