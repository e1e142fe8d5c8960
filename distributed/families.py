"""The families of generators that a run can train, by `generator.name`."""

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import Oracle
from distributed.config import ExperimentConfig
from distributed.design_evaluation import DesignEvaluator
from distributed.evaluation import Evaluator

AnyEvaluator = Evaluator | DesignEvaluator


def make_evaluator(config: ExperimentConfig, environment: SequenceEnvironment, oracle: Oracle) -> AnyEvaluator:
    """The evaluator of the configured generator; raises ConfigError or OracleDataError for what cannot be evaluated."""
    family = Evaluator if config.generator.name == "gflownet" else DesignEvaluator
    return family(config, environment, oracle)
