"""A user's Python function as oracle: `package.module:function`, a list of strings in, their scores out.

The function runs in processes of its own, in batches, with a time limit, retries, and a cache of repeated sequences.
"""

import contextlib
import json
import logging
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import OracleDataError, OracleError
from actors.oracles.score_cache import ScoreCache
from learner.configs import AbsolutePath, StrictConfig

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
    num_processes: int = Field(1, ge=1, le=1024)
    """Calls under way at a time in each rollout actor, each in a process of its own: with several, a slow sequence holds up
    only its own call."""
    timeout_seconds: float = Field(60.0, gt=0)
    """A call that takes longer is stopped (its process is killed) and counts as failed."""
    max_retries: int = Field(2, ge=0, le=100)
    """How often a failed call is tried again before its sequences are rejected."""
    max_consecutive_failures: int = Field(20, ge=1)
    """After this many failed calls in a row the oracle is given up and the run ends with the cause."""
    cache_size: int = Field(200_000, ge=0)
    """Scores remembered per rollout actor, least recently used first out; 0: none."""
    cache_folder: AbsolutePath | None = None
    """Folder on each node's disk in which its rollout actors share scores, kept for later runs; a file for each function and
    version of its module. null: none."""

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
        self.source_hash: str = answer["source_hash"]
        """Of the module's text."""

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

    def kill(self) -> None:
        """End the process, and whatever programs the function started; a call under way fails."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End everything, and close the pipes."""
        self.kill()
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
    """Scores by a user's function; a sequence that makes it fail gets NaN, one that makes it hang too. Safe for threads."""

    enumerable = False
    reference: np.ndarray | None = None

    def __init__(self, config: CallableOracleConfig, environment: SequenceEnvironment):
        """Starts a process, so that a function that cannot be imported is an OracleDataError at once."""
        self._config, self._environment = config, environment
        self._lock, self._failures = threading.Lock(), 0
        self.num_calls = 0
        """Calls made to the function."""
        try:
            first = FunctionProcess(config.function)
        except _CallFailed as error:
            raise OracleDataError(f"oracle.function: {config.function}: {error}") from error
        self._idle: queue.LifoQueue[FunctionProcess | None] = queue.LifoQueue()
        """Processes to call; None: one that is not started yet."""
        for process in [None] * (config.num_processes - 1) + [first]:
            self._idle.put(process)
        self._busy: set[FunctionProcess] = set()
        self._closed = False
        self._threads = ThreadPoolExecutor(config.num_processes, thread_name_prefix="oracle")
        file = f"{config.function.replace(':', '.')}-{first.source_hash}.sqlite"
        self._cache = ScoreCache(config.cache_size, config.cache_folder and config.cache_folder / file)

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float32 [B]; each distinct sequence is sent once. Raises OracleError after too many failures in a row."""
        distinct, inverse = np.unique(self._environment.sequences(tokens, lengths), return_inverse=True)
        scores = self._cache.get(distinct)
        missing = np.flatnonzero(np.isnan(scores))
        size = min(self._config.batch_size, max(1, math.ceil(len(missing) / self._config.num_processes)))
        parts = [missing[start : start + size] for start in range(0, len(missing), size)]
        calls = [self._threads.submit(self._score_part, distinct[rows]) for rows in parts]
        try:
            for rows, call in zip(parts, calls, strict=True):
                scores[rows] = call.result()
        finally:
            for call in calls:
                call.cancel()
        return scores[inverse].astype(np.float32)

    def close(self) -> None:
        """End the processes; calls under way fail."""
        with self._lock:
            self._closed = True
            for process in self._busy:
                process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            idle = self._idle.get()
            if idle is not None:
                idle.close()
        self._cache.close()

    def _score_part(self, sequences: np.ndarray) -> np.ndarray:
        scores = self._score_batch(sequences, retries=self._config.max_retries, whole=True)
        self._cache.put(sequences, scores)
        return scores

    def _score_batch(self, sequences: np.ndarray, *, retries: int, whole: bool) -> np.ndarray:
        """Scores [n]; after `retries` more tries a batch that raises is split until the culprits are alone."""
        for attempt in range(retries + 1):
            try:
                scores = self._call([s.decode("ascii") for s in sequences.tolist()])
            except _CallFailed as error:
                # that a part fails which holds a culprit says nothing new
                failures = self._count_failure(int(whole or len(sequences) == 1))
                logger.warning("oracle %s failed on %d sequences: %s", self._config.function, len(sequences), error)
                if failures >= self._config.max_consecutive_failures:
                    raise OracleError(
                        f"oracle {self._config.function} failed {failures} times in a row; last: {error}"
                    ) from error
                if error.hung and attempt == retries:
                    return np.full(len(sequences), np.nan)
            else:
                self._count_failure(None)
                return scores
        if len(sequences) == 1:
            return np.full(1, np.nan)
        scores = np.empty(len(sequences))
        for part in (slice(0, None, 2), slice(1, None, 2)):  # not halves: sorted neighbours may fail together
            scores[part] = self._score_batch(sequences[part], retries=0, whole=False)
        return scores

    def _count_failure(self, more: int | None) -> int:
        """Failures in a row, `more` of them new; None: a success ends the row."""
        with self._lock:
            self._failures = 0 if more is None else self._failures + more
            return self._failures

    def _call(self, sequences: list[str]) -> np.ndarray:
        process = self._idle.get()
        try:
            if process is None or not process.alive:
                if process is not None:
                    process.close()
                process = FunctionProcess(self._config.function)
            with self._lock:
                if self._closed:
                    raise OracleError(f"oracle {self._config.function} was closed")
                self.num_calls += 1
                self._busy.add(process)
            return process.call(sequences, self._config.timeout_seconds)
        finally:
            with self._lock:
                self._busy -= {process}
            self._idle.put(process)
