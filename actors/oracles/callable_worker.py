"""The process in which a user's oracle function runs: one JSON line of sequences in, one of scores out.

Started as `python -m actors.oracles.callable_worker package.module:function` by `CallableOracle`; a crash, a hang or
output printed by the function thus never reaches the rollout worker.
"""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path


def load_function(name: str) -> Callable[[list[str]], list[float]]:
    """The function `package.module:function`; raises an error if there is none."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"{name!r} is not of the form package.module:function")
    loaded = getattr(importlib.import_module(module), function)
    if not callable(loaded):
        raise TypeError(f"not callable, but of type {type(loaded).__name__}")
    return loaded


def source_hash(function: Callable) -> str:
    """Of the text of the module in which `function` is; of nothing where there is no text."""
    path = getattr(sys.modules.get(function.__module__), "__file__", None)
    try:
        text = Path(path or os.devnull).read_bytes()
    except OSError:
        text = b""
    return hashlib.sha256(text).hexdigest()[:16]


def main() -> None:
    """Answer requests until the input closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the function prints goes to stderr
    try:
        function = load_function(sys.argv[1])
        _answer(answers, {"source_hash": source_hash(function)})
    except Exception as error:  # whatever a user's module raises on import is reported, not lost
        _answer(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        try:
            _answer(answers, {"scores": [float(score) for score in function(json.loads(line))]})
        except Exception as error:  # whatever a user's function raises is reported, and the process lives on
            _answer(answers, {"error": f"{type(error).__name__}: {error}"})


def _answer(stream, message: dict) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
