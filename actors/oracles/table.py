"""Oracles that look scores up: a full table of a space, or a list of measured sequences."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
from pydantic import Field

from actors.environments.sequence import SequenceEnvironment, SequenceError
from actors.oracles.base import OracleDataError
from learner.configs import AbsolutePath, StrictConfig

MAX_LINE = 1_000_000
"""Characters in a line of a CSV or FASTA file."""
FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".faa")
MAX_SHOWN = 20
"""Columns that a message names."""


class TableOracle:
    """The score of every sequence of a fixed-length space, by its index in base V."""

    enumerable = True
    reference: np.ndarray | None = None

    def __init__(self, scores: np.ndarray, num_tokens: int):
        """`scores` float32 [V^T] in lexicographic order of the sequences."""
        self._scores, self._num_tokens = scores, num_tokens

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Scores float32 [B] of `tokens` int [B, T]."""
        places = self._num_tokens ** np.arange(tokens.shape[1] - 1, -1, -1)
        return self._scores[tokens.astype(np.int64) @ places]

    def close(self) -> None:
        """Nothing to release."""


class LookupConfig(StrictConfig):
    """What is common to oracles that list measured sequences."""

    missing_score: float | None = Field(0.0, ge=0)
    """Score of a sequence that the data do not list; null: reject it."""
    normalise: Literal["none", "minmax"] = "none"
    """minmax: map the scores to 0..1; needed where some are negative."""


class CsvOracleConfig(LookupConfig):
    """Measured sequences in a CSV file."""

    name: Literal["csv"]
    """Kind of oracle."""
    path: AbsolutePath
    """The file; its first line names the columns."""
    sequence_column: str = "sequence"
    """Column that holds the sequence."""
    score_column: str = "score"
    """Column that holds the score."""


class NpyOracleConfig(LookupConfig):
    """A pair of `.npy` files as Design-Bench stores them."""

    name: Literal["npy"]
    """Kind of oracle."""
    tokens_path: AbsolutePath
    """Integer token indices [n, length]."""
    scores_path: AbsolutePath
    """Their scores, [n] or [n, 1]."""


class LookupOracle:
    """Scores of listed sequences; any other gets `missing_score`, or NaN where that is None."""

    enumerable = True

    def __init__(
        self,
        environment: SequenceEnvironment,
        sequences: np.ndarray,
        scores: np.ndarray,
        config: LookupConfig,
        *,
        origin: str,
    ):
        """`sequences` bytes [n]; `scores` float [n]. Raises OracleDataError for contradictions and bad scores."""
        _check_scores(scores, config, origin)
        self._environment = environment
        self._sequences, first, inverse = np.unique(sequences, return_index=True, return_inverse=True)
        kept = scores[first].astype(np.float64)
        differing = np.flatnonzero(~np.isclose(kept[inverse], scores, rtol=1e-6, atol=1e-9))
        if len(differing):
            row = differing[0]
            raise OracleDataError(
                f"{origin}: sequence {sequences[row].decode()} is listed with the scores {kept[inverse[row]]:g} "
                f"and {scores[row]:g} (row {row + 1}); each sequence may have one score"
            )
        if config.normalise == "minmax":
            if kept.min() == kept.max():
                raise OracleDataError(f"{origin}: all scores are {kept[0]:g}, so they cannot be mapped to 0..1")
            kept = (kept - kept.min()) / (kept.max() - kept.min())
        self._scores = kept.astype(np.float32)
        self.reference: np.ndarray | None = self._sequences
        self._missing = np.float32(np.nan if config.missing_score is None else config.missing_score)

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Scores float32 [B] of `tokens` int [B, T] with `lengths` int [B]."""
        asked = self._environment.sequences(tokens, lengths)
        place = np.minimum(np.searchsorted(self._sequences, asked), len(self._sequences) - 1)
        return np.where(self._sequences[place] == asked, self._scores[place], self._missing).astype(np.float32)

    def close(self) -> None:
        """Nothing to release."""


def _check_scores(scores: np.ndarray, config: LookupConfig, origin: str) -> None:
    if len(scores) == 0:
        raise OracleDataError(f"{origin}: holds no sequence")
    largest = np.finfo(np.float32).max
    bad = np.flatnonzero(~(np.abs(scores) <= largest))
    if len(bad):
        allowed = f"up to ±{largest:.3g}" if np.isfinite(scores[bad[0]]) else "finite numbers"
        raise OracleDataError(f"{origin}: row {bad[0] + 1} has the score {scores[bad[0]]}; allowed: {allowed}")
    if config.normalise == "minmax":
        return
    elif scores.min() < 0:
        row = int(scores.argmin())
        raise OracleDataError(
            f"{origin}: row {row + 1} has the negative score {scores[row]:g}; allowed: scores >= 0, or oracle.normalise: minmax"
        )


def csv_oracle(config: CsvOracleConfig, environment: SequenceEnvironment) -> LookupOracle:
    """Read the CSV file; raises OracleDataError naming file, row and column of the first fault."""
    sequences, texts = _read_columns(config.path, [config.sequence_column, config.score_column])
    scores = [_number(text, f"{config.path}: row {row}") for row, text in enumerate(texts, 1)]
    return _lookup(environment, sequences, np.asarray(scores), config, str(config.path))


def read_sequences(path: Path) -> list[str]:
    """The sequences of a FASTA file (by its suffix), or in the column `sequence` of a CSV file; raises OracleDataError."""
    if path.suffix.lower() not in FASTA_SUFFIXES:
        return _read_columns(path, ["sequence"])[0]
    records: list[list[str]] = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(_lines(file), start=1):
                if line.startswith(">"):
                    records.append([])
                elif line.strip() and not records:
                    raise OracleDataError(
                        f"{path}: line {number}: a FASTA file begins with a line that starts with '>'"
                    )
                elif line.strip():
                    records[-1].append(line.strip())
    except OracleDataError:
        raise
    except (OSError, ValueError) as error:
        raise OracleDataError(f"{path}: cannot be read ({error})") from error
    if not records:
        raise OracleDataError(f"{path}: holds no sequence")
    return ["".join(parts) for parts in records]


def _read_columns(path: Path, columns: list[str]) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(_lines(file))
            names = next(reader, [])
            for column in columns:
                if names.count(column) != 1:
                    number = "several columns" if column in names else "no column"
                    shown = f"{names[:MAX_SHOWN]}{' and more' if len(names) > MAX_SHOWN else ''}"
                    raise OracleDataError(f"{path}: {number} {column!r}; it has {shown}")
            places = [names.index(column) for column in columns]
            rows = [[row[place].strip() if place < len(row) else "" for place in places] for row in reader if row]
    except OracleDataError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise OracleDataError(f"{path}: cannot be read ({error})") from error
    if not rows:
        raise OracleDataError(f"{path}: holds no sequence")
    return [list(column) for column in zip(*rows, strict=True)]


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; raises ValueError for one that may have no end."""
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"a line of more than {MAX_LINE:,} characters")
        yield line


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OracleDataError(f"{where} has the score {text[:40]!r}; allowed: a number") from None


def npy_oracle(config: NpyOracleConfig, environment: SequenceEnvironment) -> LookupOracle:
    """Read the pair of arrays; raises OracleDataError for shapes or tokens that do not fit the environment."""
    tokens, scores = _load_array(config.tokens_path), _load_array(config.scores_path).reshape(-1)
    space = environment.space
    if tokens.ndim != 2 or tokens.shape[1] != space.max_length or space.variable_length:
        raise OracleDataError(
            f"{config.tokens_path}: shape {tokens.shape}; allowed: [n, {space.max_length}], fixed length"
        )
    if len(scores) != len(tokens):
        raise OracleDataError(f"{config.scores_path}: {len(scores)} scores for {len(tokens)} sequences")
    if not len(tokens):
        raise OracleDataError(f"{config.tokens_path}: holds no sequence")
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.min() < 0 or tokens.max() >= space.num_tokens:
        raise OracleDataError(f"{config.tokens_path}: allowed are integers in 0..{space.num_tokens - 1}")
    if scores.dtype.kind not in "fiu":
        raise OracleDataError(f"{config.scores_path}: holds {scores.dtype}; allowed: numbers")
    sequences = environment.sequences(tokens, np.full(len(tokens), space.max_length))
    return LookupOracle(environment, sequences, scores, config, origin=str(config.scores_path))


def _load_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy raises many types for damaged files
        raise OracleDataError(f"{path}: not a readable .npy array ({error})") from error
    if not isinstance(array, np.ndarray):
        raise OracleDataError(f"{path}: an archive of arrays; allowed: one .npy array")
    return array


def _lookup(
    environment: SequenceEnvironment, sequences: list[str], scores: np.ndarray, config: LookupConfig, origin: str
) -> LookupOracle:
    try:
        tokens, lengths = environment.tokens(sequences, origin=origin)
    except SequenceError as error:
        raise OracleDataError(str(error)) from error
    return LookupOracle(environment, environment.sequences(tokens, lengths), scores, config, origin=origin)
