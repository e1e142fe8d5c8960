"""The families of generators that a run can train, by `generator.name`."""

from typing import NamedTuple

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import Oracle
from distributed.config import ExperimentConfig
from distributed.design_evaluation import DesignEvaluator
from distributed.evaluation import EvaluatedSamples, Evaluator, ExactLaw
from distributed.forecast_evaluation import ForecastEvaluator
from learner.gflownet import EvaluationWeights

AnyEvaluator = Evaluator | DesignEvaluator | ForecastEvaluator
FAMILIES: dict[str, type[AnyEvaluator]] = {
    "gflownet": Evaluator,
    "drakes": DesignEvaluator,
    "forecast": ForecastEvaluator,
}


class Judgement(NamedTuple):
    """What is said of a generator at its end."""

    metrics: dict[str, float]
    law: ExactLaw | None
    """Where it is known exactly."""
    samples: EvaluatedSamples | None
    """None: it draws no sequences."""


def judge(evaluator: AnyEvaluator, weights: EvaluationWeights) -> Judgement:
    """All figures of `weights`."""
    if isinstance(evaluator, ForecastEvaluator):
        return Judgement(evaluator.sample_metrics(weights)[0], None, None)
    metrics, law = evaluator.exact_metrics(weights) if evaluator.is_exact else ({}, None)
    of_samples, samples = evaluator.sample_metrics(weights)
    return Judgement(metrics | of_samples, law, samples)


def make_evaluator(config: ExperimentConfig, environment: SequenceEnvironment, oracle: Oracle) -> AnyEvaluator:
    """The evaluator of the configured generator; raises ConfigError or OracleDataError for what cannot be evaluated."""
    return FAMILIES[config.generator.name](config, environment, oracle)
