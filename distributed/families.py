"""The families of generators that a run can train, by `generator.name`."""

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import Oracle
from distributed.config import ExperimentConfig
from distributed.design_evaluation import DesignEvaluator
from distributed.evaluation import Evaluator
from distributed.forecast_evaluation import ForecastEvaluator

AnyEvaluator = Evaluator | DesignEvaluator | ForecastEvaluator
FAMILIES: dict[str, type[AnyEvaluator]] = {
    "gflownet": Evaluator,
    "drakes": DesignEvaluator,
    "forecast": ForecastEvaluator,
}


def make_evaluator(config: ExperimentConfig, environment: SequenceEnvironment, oracle: Oracle) -> AnyEvaluator:
    """The evaluator of the configured generator; raises ConfigError or OracleDataError for what cannot be evaluated."""
    return FAMILIES[config.generator.name](config, environment, oracle)
