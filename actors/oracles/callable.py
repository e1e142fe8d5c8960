"""A user's Python function as oracle: `package.module:function`, a list of strings in, their scores out.

The function runs in a process of its own, in batches, with a time limit, retries, and a cache of repeated sequences.
"""

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import OracleDataError, OracleError
from learner.configs import StrictConfig

logger = logging.getLogger(__name__)
STARTUP_SECONDS = 120.0


class CallableOracleConfig(StrictConfig):
    """A Python function that scores sequences."""

    name: Literal["callable"]
    """Kind of oracle."""
    function: str
    """`package.module:function`, importable where the rollout actors run; takes a list of strings, returns scores."""
    batch_size: int = Field(256, ge=1, le=1_000_000)
    """Most sequences in one call."""
    timeout_seconds: float = Field(60.0, gt=0)
    """A call that takes longer is stopped (its process is killed) and counts as failed."""
    max_retries: int = Field(2, ge=0, le=100)
    """How often a failed call is tried again before its sequences are rejected."""
    max_consecutive_failures: int = Field(20, ge=1)
    """After this many failed calls in a row the oracle is given up and the run ends with the cause."""
    cache_size: int = Field(200_000, ge=0)
    """Scores remembered per rollout actor, least recently used first out; 0: none."""

    @field_validator("function")
    @classmethod
    def _form(cls, value: str) -> str:
        module, _, function = value.partition(":")
        if not all(part.isidentifier() for part in [*module.split("."), function]):
            raise ValueError("allowed: package.module:function")
        return value


class _CallFailed(Exception):
    """One call failed; `hung` if it ran out of time."""

    def __init__(self, reason: str, *, hung: bool = False):
        super().__init__(reason)
        self.hung = hung


class FunctionProcess:
    """The process in which a function runs (`callable_worker`); once a call kills it, it is of no more use."""

    def __init__(self, function: str):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        command = [sys.executable, "-m", "actors.oracles.callable_worker", function]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipes = (self._process.stdin, self._process.stdout)
        self._requests, self._answers, self._buffer = self._process.stdin, self._process.stdout.fileno(), b""
        answer = self._read(STARTUP_SECONDS)
        if "error" in answer:
            self.close()
            raise _CallFailed(answer["error"])

    @property
    def alive(self) -> bool:
        """Whether it can be called."""
        return self._process.poll() is None

    def call(self, sequences: list[str], timeout: float) -> np.ndarray:
        """Scores float64 [n]; raises _CallFailed, and kills the process if it gives no answer in `timeout` seconds."""
        try:
            self._requests.write(json.dumps(sequences).encode() + b"\n")
            self._requests.flush()
        except OSError as error:
            self.close()
            raise _CallFailed(f"its process is gone ({error})") from error
        answer = self._read(timeout)
        if "error" in answer:
            raise _CallFailed(answer["error"])
        scores = np.asarray(answer["scores"], dtype=np.float64)
        if scores.shape != (len(sequences),):
            raise _CallFailed(f"it returned {len(scores)} scores for {len(sequences)} sequences")
        return scores

    def close(self) -> None:
        """End the process, and whatever programs the function started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read(self, timeout: float) -> dict:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                self.close()
                raise _CallFailed(f"no answer within {timeout:g} s", hung=True)
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise _CallFailed(f"its process ended with exit code {self._process.wait()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


class CallableOracle:
    """Scores by a user's function; a sequence that makes it fail gets NaN, one that makes it hang too."""

    enumerable = False
    reference: np.ndarray | None = None

    def __init__(self, config: CallableOracleConfig, environment: SequenceEnvironment):
        """Starts the process, so that a function that cannot be imported is an OracleDataError at once."""
        self._config, self._environment = config, environment
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self._failures = 0
        self.num_calls = 0
        """Calls made to the function."""
        try:
            self._process = FunctionProcess(config.function)
        except _CallFailed as error:
            raise OracleDataError(f"oracle.function: {config.function}: {error}") from error

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float32 [B]; each distinct sequence is sent once. Raises OracleError after too many failures in a row."""
        distinct, inverse = np.unique(self._environment.sequences(tokens, lengths), return_inverse=True)
        scores = np.fromiter((self._cache.get(s, np.nan) for s in distinct.tolist()), np.float64, len(distinct))
        missing = np.flatnonzero(np.isnan(scores))
        for start in range(0, len(missing), self._config.batch_size):
            rows = missing[start : start + self._config.batch_size]
            scores[rows] = self._score_batch(distinct[rows], retries=self._config.max_retries, whole=True)
        self._remember(distinct, scores)
        return scores[inverse].astype(np.float32)

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def _remember(self, sequences: np.ndarray, scores: np.ndarray) -> None:
        if not self._config.cache_size:
            return
        for sequence, score in zip(sequences.tolist(), scores.tolist(), strict=True):
            if score == score:
                self._cache[sequence] = score
                self._cache.move_to_end(sequence)
        while len(self._cache) > self._config.cache_size:
            self._cache.popitem(last=False)

    def _score_batch(self, sequences: np.ndarray, *, retries: int, whole: bool) -> np.ndarray:
        """Scores [n]; after `retries` more tries a batch that raises is split until the culprits are alone."""
        for attempt in range(retries + 1):
            try:
                scores = self._call([s.decode("ascii") for s in sequences.tolist()])
            except _CallFailed as error:
                if whole or len(sequences) == 1:  # that a part fails which holds a culprit says nothing new
                    self._failures += 1
                logger.warning("oracle %s failed on %d sequences: %s", self._config.function, len(sequences), error)
                if self._failures >= self._config.max_consecutive_failures:
                    raise OracleError(
                        f"oracle {self._config.function} failed {self._failures} times in a row; last: {error}"
                    ) from error
                if error.hung and attempt == retries:
                    return np.full(len(sequences), np.nan)
            else:
                self._failures = 0
                return scores
        if len(sequences) == 1:
            return np.full(1, np.nan)
        scores = np.empty(len(sequences))
        for part in (slice(0, None, 2), slice(1, None, 2)):  # not halves: sorted neighbours may fail together
            scores[part] = self._score_batch(sequences[part], retries=0, whole=False)
        return scores

    def _call(self, sequences: list[str]) -> np.ndarray:
        if not self._process.alive:
            self._process.close()
            self._process = FunctionProcess(self._config.function)
        self.num_calls += 1
        return self._process.call(sequences, self._config.timeout_seconds)
