"""What every oracle offers, and what it raises."""

from typing import Protocol

import numpy as np


class OracleError(RuntimeError):
    """An oracle that could not score a batch."""


class OracleDataError(ValueError):
    """Data of an oracle that is missing or malformed; the message names the file and the place."""


class Oracle(Protocol):
    """Scores finished sequences."""

    enumerable: bool
    """Whether scoring the whole space is cheap, so that exact evaluation may do it."""
    reference: np.ndarray | None
    """bytes [m]: sequences measured beforehand, against which samples may be novel; None if there is no such list."""

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float32 [B] raw scores of `tokens` int [B, T] with `lengths` int [B]; NaN where there is no score.

        Raises OracleError if the batch as a whole could not be scored.
        """
        ...

    def close(self) -> None:
        """Release processes and files."""
        ...
