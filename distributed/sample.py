"""Draw from a trained sampler:  python -m distributed.sample RUN_OR_CHECKPOINT -n N [--format fasta|csv]

Sequences come with their score by the run's oracle, and with the log-probability of the policy's intentions. They are
drawn with the noise the environment has, or with --no-noise as the policy intends them (if noise trained the policy to
correct for it, that is another law than the trained one). With --select many are drawn, those outside the limits are dropped,
and of the others, each once, the best or a diverse set is kept. Of forecasts, N paths are drawn after the last row of the
data, or after --origin: a CSV with their quantiles and all paths, and a fan chart beside it (--out, default forecast.csv).
Open only checkpoints you trust: they name the oracle, which is run.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np

from distributed import cli
from distributed.config import ConfigError, ExperimentConfig
from distributed.config_keys import validate_section
from distributed.evaluate import read_sampler
from distributed.forecasts import DrawForecastConfig, draw_forecast
from distributed.forecasts import write_csv as write_forecast_csv
from distributed.progress import configure_logging
from distributed.sampling import SampleConfig, Samples, sample
from learner.gflownet import EvaluationWeights

Wanted = TypeVar("Wanted", SampleConfig, DrawForecastConfig)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distributed.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="run folder, checkpoint folder, learner.pt or exported sampler",
    )
    parser.add_argument("-n", "--number", dest="n", type=int, help="sequences wanted (default 100)")
    parser.add_argument("--format", choices=("fasta", "csv"), help="output format (default fasta; of forecasts csv)")
    parser.add_argument("--out", type=Path, help="output file (default: standard output)")
    parser.add_argument("--seed", type=int, help="seed of the draw (default 0)")
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
    chosen = parser.add_argument_group("candidates, each once, chosen among many that are drawn")
    chosen.add_argument(
        "--select", choices=("top", "diverse"), help="keep the best, or from the best on the farthest apart"
    )
    chosen.add_argument("--from", dest="num_drawn", type=int, metavar="M", help="draw M (default 10 n, at least 2048)")
    chosen.add_argument("--min-score", type=float, metavar="S", help="drop those that score less")
    chosen.add_argument(
        "--gc-min", type=float, metavar="SHARE", help="drop those with a smaller share of G and C (0 to 1)"
    )
    chosen.add_argument("--gc-max", type=float, metavar="SHARE", help="drop those with a larger one")
    chosen.add_argument(
        "--forbid", nargs="+", type=str.upper, metavar="MOTIF",
        help="drop those with such a motif (letters of IUPAC) on either strand",
    )  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options, overrides = cli.parse_with_overrides(_parser(), arguments)
    configure_logging()
    config, weights = read_sampler(options.path, overrides)
    if config.generator.name == "forecast":
        return write_forecast(config, weights, options)
    samples = sample(config, weights, _wanted(SampleConfig, options, config.generator.name))
    with _output(options.out) as stream:
        WRITERS[options.format or "fasta"](stream, samples)
    return cli.EXIT_DONE


def _wanted(model: type[Wanted], options: argparse.Namespace, generator: str) -> Wanted:
    """The options as a `model`; raises ConfigError for those that are of other generators."""
    names = {*SampleConfig.model_fields, *DrawForecastConfig.model_fields}
    given = {name: getattr(options, name) for name in sorted(names) if getattr(options, name) is not None}
    stray = ", ".join(name for name in given if name not in model.model_fields)
    if stray:
        raise ConfigError(f"{stray}: not for generator.name {generator}; allowed: {', '.join(model.model_fields)}")
    return validate_section(model, "", given)


def write_forecast(config: ExperimentConfig, weights: EvaluationWeights, options: argparse.Namespace) -> int:
    """The paths as a CSV and their fan chart; returns the exit code."""
    if options.format == "fasta":
        raise ConfigError("--format: forecasts are written as csv")
    forecast = draw_forecast(config, weights, _wanted(DrawForecastConfig, options, config.generator.name))
    path = options.out or Path("forecast.csv")
    with _output(path) as stream:
        write_forecast_csv(stream, forecast)
    from distributed import plots  # takes longer to load than sequences take to be drawn

    chart = path.with_suffix(".png")
    try:
        plots.fan_chart(forecast, chart)
    except OSError as error:
        raise ConfigError(f"--out: {chart} cannot be written ({error})") from error
    print(path)
    print(chart)
    return cli.EXIT_DONE


def _rows(samples: Samples) -> Iterator[tuple[str, str, str]]:
    """(sequence, score, log-probability of the intentions); an empty score where the oracle has none."""
    for sequence, score, log_prob in zip(*samples, strict=True):
        yield sequence, f"{score:.6g}" if np.isfinite(score) else "", f"{log_prob:.6g}"


def write_fasta(stream: TextIO, samples: Samples) -> None:
    """Records >sample_1 score=… log_policy=…"""
    for number, (sequence, score, log_prob) in enumerate(_rows(samples), 1):
        known = f" score={score}" if score else ""
        stream.write(f">sample_{number}{known} log_policy={log_prob}\n{sequence}\n")


def write_csv(stream: TextIO, samples: Samples) -> None:
    """Columns sequence, score, log_policy."""
    writer = csv.writer(stream)
    writer.writerow(["sequence", "score", "log_policy"])
    writer.writerows(_rows(samples))


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
