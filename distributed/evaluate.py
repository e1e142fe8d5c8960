"""Judge a trained sampler:  python -m distributed.evaluate RUN_OR_CHECKPOINT [--json]

Exact distances to the target where the space can be enumerated, and metrics of noisy samples; of forecasts, a comparison
with naive, seasonal naive and exponential smoothing on the test rows. Reads a run folder, a checkpoint folder, a learner.pt
file or an exported sampler; open only those you trust: they name the oracle, which is run. Config keys can be changed (for
example --evaluation.num_samples 10000).
"""

import argparse
from pathlib import Path

from distributed import cli
from distributed.checkpoints import load_sampler
from distributed.config import ConfigError, ExperimentConfig, apply_overrides, validate
from distributed.experiment import check_memory, make_environment, make_oracle
from distributed.families import AnyEvaluator, judge, make_evaluator
from distributed.progress import configure_logging, print_summary
from distributed.run_folder import to_json
from learner.checkpoint import CheckpointError
from learner.gflownet import EvaluationWeights


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m distributed.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="run folder, checkpoint folder, learner.pt or exported sampler",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    options, overrides = cli.parse_with_overrides(parser, arguments)
    configure_logging()
    figures = evaluate(*read_sampler(options.path, overrides))
    if options.json:
        print(to_json(figures))
    else:
        print_summary(figures, str(options.path))
    return cli.EXIT_DONE


def evaluate(config: ExperimentConfig, weights: EvaluationWeights) -> dict[str, float]:
    """All figures of a trained sampler, with its step and seed; raises ConfigError."""
    evaluator = open_evaluator(config, weights)
    try:
        metrics = judge(evaluator, weights).metrics
    finally:
        evaluator.oracle.close()
    return metrics | {"num_learner_steps": weights.step, "seed": config.run.seed}


def open_sampler(path: Path, overrides: list[tuple[str, str]]) -> tuple[AnyEvaluator, EvaluationWeights]:
    """Evaluator and weights of a trained sampler; raises ConfigError for whatever cannot be read or does not fit."""
    config, weights = read_sampler(path, overrides)
    return open_evaluator(config, weights), weights


def read_sampler(path: Path, overrides: list[tuple[str, str]]) -> tuple[ExperimentConfig, EvaluationWeights]:
    """Configuration, changed by `overrides`, and weights of a trained sampler; raises ConfigError."""
    try:
        config, weights = load_sampler(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    return override(config, overrides), weights


def open_evaluator(config: ExperimentConfig, weights: EvaluationWeights) -> AnyEvaluator:
    """The evaluator of a configuration, with the weights to judge; raises ConfigError for what does not fit or cannot be had."""
    try:
        check_memory(config, training=False)
        environment = make_environment(config)
        evaluator = make_evaluator(config, environment, make_oracle(config, environment))
        evaluator.load(weights)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return evaluator


def override(config: ExperimentConfig, overrides: list[tuple[str, str]]) -> ExperimentConfig:
    """`config` with dotted keys replaced; raises ConfigError."""
    return validate(apply_overrides(config.model_dump(mode="json"), overrides)) if overrides else config


if __name__ == "__main__":
    cli.exit_with(main)
