"""What the commands share: `--section.key value` options, help on them, and exit codes."""

import argparse
import sys
from collections.abc import Callable

from actors.oracles.base import OracleError
from distributed.config import ConfigError, ExperimentConfig
from distributed.config_keys import describe_fields
from learner.metrics import NoSampleError

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Take out `--section.key value` and `--section.key=value` pairs, and parse what is left; exits with 2 on misuse."""
    words, overrides, plain = iter(sys.argv[1:] if arguments is None else arguments), [], []
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            plain.append(word)
            continue
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                parser.error(f"--{key}: a value is missing")
            value = following
        overrides.append((key, value))
    return parser.parse_args(plain), overrides


def config_help() -> str:
    """All config keys with their defaults and meaning."""
    lines = ["config keys (in the YAML file, or as --section.key value):"]
    lines += [
        f"  --{key}  (default {default})\n        {text}" for key, default, text in describe_fields(ExperimentConfig)
    ]
    return "\n".join(lines)


def exit_with(command: Callable[[list[str] | None], int]) -> None:
    """Run a command's `main` and exit with its code; a ConfigError is a message and code 2."""
    try:
        code = command(None)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USAGE
    except (OracleError, NoSampleError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        code = EXIT_FAILED
    sys.exit(code)
