"""Draw sequences from a trained sampler:  python -m distributed.sample RUN_OR_CHECKPOINT -n N [--format fasta|csv]

Sequences come with their score by the run's oracle, and with the log-probability of the policy's intentions. They are
drawn with the noise the environment has, or with --no-noise as the policy intends them (if noise trained the policy to
correct for it, that is another law than the trained one). Open only checkpoints you trust: they name the oracle, which is run.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from actors.trajectories import TrajectoryBatch, concatenate
from distributed import cli
from distributed.config import ConfigError, validate_section
from distributed.design_evaluation import DesignEvaluator
from distributed.evaluate import open_sampler
from distributed.experiment import derive_seed
from distributed.families import AnyEvaluator
from distributed.progress import configure_logging
from learner.drakes.filters import FilterConfig
from learner.drakes.sampling import parse_template
from learner.gflownet import EvaluationWeights

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
    try:
        how = _how(options, evaluator)
        samples = draw(evaluator, weights, options.number, seed=options.seed, **how)
    finally:
        evaluator.oracle.close()
    with _output(options.out) as stream:
        WRITERS[options.format](stream, evaluator, samples)
    return cli.EXIT_DONE


def _how(options: argparse.Namespace, evaluator: AnyEvaluator) -> dict[str, Any]:
    """What `samples` of the evaluator takes besides number and seed; raises ConfigError for what does not fit it."""
    given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    filters = {name: value for name, value in given.items() if value is not None}
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


def draw(evaluator: AnyEvaluator, weights: EvaluationWeights, count: int, *, seed: int, **how: Any) -> TrajectoryBatch:
    """`count` scored trajectories, drawn in chunks so that memory stays bounded; `how`: see `samples` of the evaluator."""
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    return concatenate(
        [
            evaluator.samples(weights, size, seed=derive_seed(seed, "sample", index), **how)
            for index, size in enumerate(sizes)
        ]
    )


def _rows(evaluator: AnyEvaluator, samples: TrajectoryBatch) -> Iterator[tuple[str, str, str]]:
    """(sequence, score, log-probability of the intentions); an empty score where the oracle has none."""
    environment = evaluator.environment
    sequences = environment.sequences(samples.tokens, environment.lengths(samples.tokens, samples.num_steps))
    for sequence, score, log_prob in zip(sequences.tolist(), samples.scores, samples.log_behaviour.sum(1), strict=True):
        yield sequence.decode("ascii"), f"{score:.6g}" if np.isfinite(score) else "", f"{log_prob:.6g}"


def write_fasta(stream: TextIO, evaluator: AnyEvaluator, samples: TrajectoryBatch) -> None:
    """Records >sample_1 score=… log_policy=…"""
    for number, (sequence, score, log_prob) in enumerate(_rows(evaluator, samples), 1):
        known = f" score={score}" if score else ""
        stream.write(f">sample_{number}{known} log_policy={log_prob}\n{sequence}\n")


def write_csv(stream: TextIO, evaluator: AnyEvaluator, samples: TrajectoryBatch) -> None:
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
