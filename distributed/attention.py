"""Draw what a trained transformer attends to:  python -m distributed.attention RUN_OR_CHECKPOINT SEQUENCE [--out FILE]

One panel for each layer and head; a row is a position, and shows how much it reads of the beginning (^) and of each
earlier token. With a thought context, the second stream is drawn too; it reads the intended sequence.
Open only checkpoints you trust: they name the oracle, which is run.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from actors.environments.sequence import SequenceError
from distributed import cli
from distributed.config import ConfigError
from distributed.design_evaluation import DesignEvaluator
from distributed.evaluate import open_sampler
from distributed.evaluation import Evaluator
from distributed.forecast_evaluation import ForecastEvaluator
from distributed.plots import attention_maps
from distributed.progress import configure_logging
from learner.drakes.denoiser import encode
from learner.drakes.sampling import parse_template
from learner.networks.prefixes import join_symbols
from learner.networks.transformer import PrefixTransformer


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m distributed.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path", type=Path, metavar="RUN_OR_CHECKPOINT", help="run folder, checkpoint folder or learner.pt"
    )
    parser.add_argument("sequence", help="the realised sequence")
    parser.add_argument("--intended", metavar="SEQUENCE", help="the intended sequence (default: the realised one)")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="PNG file (default attention.png)")
    options, overrides = cli.parse_with_overrides(parser, arguments)
    configure_logging()
    evaluator, weights = open_sampler(options.path, overrides)
    evaluator.oracle.close()
    if isinstance(evaluator, ForecastEvaluator):
        raise ConfigError("generator.name: forecast draws no sequences; attention is drawn for gflownet and drakes")
    evaluator.load(weights)
    intended = options.intended or options.sequence
    if isinstance(evaluator, DesignEvaluator):
        maps, texts = [denoiser_attention(evaluator, options.sequence)], [options.sequence]
    else:
        maps = attention(evaluator, options.sequence, intended)
        texts = ["^" + text for text in (options.sequence, intended)][: len(maps)]
    try:
        attention_maps(maps, texts, options.out)
    except OSError as error:
        raise ConfigError(f"--out: {options.out} cannot be written ({error})") from error
    print(options.out)
    return cli.EXIT_DONE


@torch.no_grad()
def denoiser_attention(evaluator: DesignEvaluator, sequence: str) -> np.ndarray:
    """Attention weights [layers, heads, L, L] on a sequence in which N is a masked position; raises ConfigError."""
    alphabet, length = evaluator.environment.config.alphabet, evaluator.environment.config.length
    try:
        tokens = parse_template(sequence, alphabet, length)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return evaluator.denoiser.attention(encode(tokens, len(alphabet))[None])[:, 0].numpy()


@torch.no_grad()
def attention(evaluator: Evaluator, sequence: str, intended: str) -> list[np.ndarray]:
    """Attention weights [layers, heads, t+1, t+1] of each stream on a sequence of t tokens; raises ConfigError."""
    network, environment = evaluator.policy.network, evaluator.environment
    if not isinstance(network, PrefixTransformer):
        raise ConfigError(f"network.name: {evaluator.config.network.name} has no attention; allowed: transformer")
    if len(intended) != len(sequence):
        raise ConfigError(f"--intended: has {len(intended)} tokens, the sequence {len(sequence)}")
    try:
        tokens, _ = environment.tokens([sequence, intended], origin="the command line")
    except SequenceError as error:
        raise ConfigError(str(error)) from error
    tokens = tokens[:, : len(sequence)]
    symbols = join_symbols(tokens[:1], tokens[1:], environment.space.num_actions, network.thought_context)
    return [weights[:, 0].numpy() for weights in network.attention(torch.from_numpy(symbols))]


if __name__ == "__main__":
    cli.exit_with(main)
