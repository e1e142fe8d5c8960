"""What every oracle offers, and what it raises."""

from typing import Protocol

import numpy as np
import torch

from learner.rewards import RewardConfig, log_reward


class OracleError(RuntimeError):
    """An oracle that could not score a batch."""


class OracleDataError(ValueError):
    """Data of an oracle that is missing or malformed; the message names the file and the place."""


def valid_scores(scores: np.ndarray) -> np.ndarray:
    """bool [B]: which of `scores` float [B] are finite and not negative; trajectories with another are rejected."""
    with np.errstate(invalid="ignore"):
        return np.isfinite(scores) & (scores >= 0)


def valid_log_rewards(scores: np.ndarray, reward: RewardConfig) -> np.ndarray:
    """float64 [B]: log R of the final reward, minus infinity where a score of `scores` float [B] is not valid."""
    valid = valid_scores(scores)
    log_rewards = log_reward(torch.from_numpy(np.where(valid, scores, 0)), reward).double().numpy()
    return np.where(valid, log_rewards, -np.inf)


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
