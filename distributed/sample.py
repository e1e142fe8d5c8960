"""Draw from a trained sampler:  python -m distributed.sample RUN_OR_CHECKPOINT -n N [--format fasta|csv]

Sequences come with their score by the run's oracle, and with the log-probability of the policy's intentions. They are
drawn with the noise the environment has, or with --no-noise as the policy intends them (if noise trained the policy to
correct for it, that is another law than the trained one). Of forecasts, N paths are drawn after the last row of the data, or
after --origin: a CSV with their quantiles and all paths, and a fan chart beside it (--out, default forecast.csv). Open only
checkpoints you trust: they name the oracle, which is run.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from actors.series import SeriesError
from actors.trajectories import TrajectoryBatch, concatenate
from distributed import cli
from distributed.config import ConfigError, validate_section
from distributed.design_evaluation import DesignEvaluator
from distributed.evaluate import open_sampler
from distributed.evaluation import Evaluator
from distributed.experiment import derive_seed
from distributed.forecast_evaluation import ForecastEvaluator
from distributed.progress import configure_logging
from learner.drakes.filters import FilterConfig
from learner.drakes.sampling import parse_template
from learner.gflownet import EvaluationWeights

SequenceEvaluator = Evaluator | DesignEvaluator
QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
CHUNK = 4096
"""Sequences drawn at once."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m distributed.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "path", type=Path, metavar="RUN_OR_CHECKPOINT", help="run folder, checkpoint folder or learner.pt"
    )
    parser.add_argument("-n", "--number", type=int, default=100, help="sequences to draw (default 100)")
    parser.add_argument("--format", choices=("fasta", "csv"), default="fasta", help="output format (default fasta)")
    parser.add_argument("--out", type=Path, help="output file (default: standard output)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")
    parser.add_argument(
        "--noise", action=argparse.BooleanOptionalAction, default=True, help="draw with the environment's noise"
    )
    parser.add_argument("--origin", help="for forecast: the time of the last known row (default: that of the data)")
    parser.add_argument("--template", help="for drakes: positions to keep, and N where to fill, such as ACGNNNNN")
    for name, kind, text in (
        ("temperature", float, "logits are divided by it"),
        ("top-k", int, "draw only from the k likeliest letters"),
        ("top-p", float, "draw only from the likeliest letters that reach this mass"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"for drakes: {text}")
    options, overrides = cli.parse_with_overrides(parser, arguments)
    configure_logging()
    if options.number < 1 or options.seed < 0:
        raise ConfigError(f"-n and --seed: got {options.number} and {options.seed}; allowed: n >= 1, seed >= 0")
    evaluator, weights = open_sampler(options.path, [("evaluation.exact", "never"), *overrides])
    if isinstance(evaluator, ForecastEvaluator):
        return write_forecast(evaluator, weights, options)
    try:
        how = _how(options, evaluator)
        samples = draw(evaluator, weights, options.number, seed=options.seed, **how)
    finally:
        evaluator.oracle.close()
    with _output(options.out) as stream:
        WRITERS[options.format](stream, evaluator, samples)
    return cli.EXIT_DONE


def write_forecast(evaluator: ForecastEvaluator, weights: EvaluationWeights, options: argparse.Namespace) -> int:
    """The paths as a CSV and their fan chart; returns the exit code."""
    if any(getattr(options, name) is not None for name in ("template", "temperature", "top_k", "top_p")):
        raise ConfigError("--template, --temperature, --top-k and --top-p go with generator.name drakes only")
    series, path = evaluator.task.series, options.out or Path("forecast.csv")
    try:
        origin = len(series) - 1 if options.origin is None else series.row(options.origin)
        if origin + 1 < evaluator.data.window:
            raise SeriesError(
                f"--origin: {options.origin} has fewer than data.window ({evaluator.data.window}) rows up to it"
            )
    except SeriesError as error:
        raise ConfigError(str(error)) from error
    forecast = evaluator.forecast(weights, origin, options.number, seed=options.seed, noise=options.noise)
    times, names = series.next_times(origin, evaluator.data.horizon), evaluator.data.target_names
    levels = {"mean": forecast.paths.mean(0)} | {
        f"q{100 * level:02.0f}": np.quantile(forecast.paths, level, axis=0) for level in QUANTILES
    }
    with _output(path) as stream:
        writer = csv.writer(stream)
        writer.writerow(["time", "target", *levels, *(f"path_{n}" for n in range(1, options.number + 1))])
        for step, column in np.ndindex(len(times), len(names)):
            values = [*(level[step, column] for level in levels.values()), *forecast.paths[:, step, column]]
            writer.writerow([times[step], names[column], *(f"{value:.8g}" for value in values)])
    chart = path.with_suffix(".png")
    try:
        evaluator.fan_chart(forecast, chart)
    except OSError as error:
        raise ConfigError(f"--out: {chart} cannot be written ({error})") from error
    print(path)
    print(chart)
    return cli.EXIT_DONE


def _how(options: argparse.Namespace, evaluator: SequenceEvaluator) -> dict[str, Any]:
    """What `samples` of the evaluator takes besides number and seed; raises ConfigError for what does not fit it."""
    given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    filters = {name: value for name, value in given.items() if value is not None}
    if options.origin is not None:
        raise ConfigError("--origin goes with generator.name forecast only")
    if not isinstance(evaluator, DesignEvaluator):
        if filters or options.template is not None:
            raise ConfigError("--template, --temperature, --top-k and --top-p go with generator.name drakes only")
        return {"noise": options.noise}
    how: dict[str, Any] = {"filters": validate_section(FilterConfig, "", filters)}
    if options.template is not None:
        environment = evaluator.environment.config
        try:
            how["template"] = parse_template(options.template.upper(), environment.alphabet, environment.length)
        except ValueError as error:
            raise ConfigError(f"--template: {error}") from error
    return how


def draw(
    evaluator: SequenceEvaluator, weights: EvaluationWeights, count: int, *, seed: int, **how: Any
) -> TrajectoryBatch:
    """`count` scored trajectories, drawn in chunks so that memory stays bounded; `how`: see `samples` of the evaluator."""
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    return concatenate(
        [
            evaluator.samples(weights, size, seed=derive_seed(seed, "sample", index), **how)
            for index, size in enumerate(sizes)
        ]
    )


def _rows(evaluator: SequenceEvaluator, samples: TrajectoryBatch) -> Iterator[tuple[str, str, str]]:
    """(sequence, score, log-probability of the intentions); an empty score where the oracle has none."""
    environment = evaluator.environment
    sequences = environment.sequences(samples.tokens, environment.lengths(samples.tokens, samples.num_steps))
    for sequence, score, log_prob in zip(sequences.tolist(), samples.scores, samples.log_behaviour.sum(1), strict=True):
        yield sequence.decode("ascii"), f"{score:.6g}" if np.isfinite(score) else "", f"{log_prob:.6g}"


def write_fasta(stream: TextIO, evaluator: SequenceEvaluator, samples: TrajectoryBatch) -> None:
    """Records >sample_1 score=… log_policy=…"""
    for number, (sequence, score, log_prob) in enumerate(_rows(evaluator, samples), 1):
        known = f" score={score}" if score else ""
        stream.write(f">sample_{number}{known} log_policy={log_prob}\n{sequence}\n")


def write_csv(stream: TextIO, evaluator: SequenceEvaluator, samples: TrajectoryBatch) -> None:
    """Columns sequence, score, log_policy."""
    writer = csv.writer(stream)
    writer.writerow(["sequence", "score", "log_policy"])
    writer.writerows(_rows(evaluator, samples))


WRITERS = {"fasta": write_fasta, "csv": write_csv}


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    try:
        with open(path, "w", newline="") as stream:
            yield stream
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written ({error})") from error


if __name__ == "__main__":
    cli.exit_with(main)
