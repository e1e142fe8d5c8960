"""From an oracle's score to the log-reward that the sampler is trained on."""

import math

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from learner.configs import StrictConfig


class RewardConfig(StrictConfig):
    """log R(x) = beta(n) * log max(score, floor)."""

    exponent: float = Field(3.0, gt=0, le=1000)
    """Final reward exponent beta; larger concentrates the sampler on high scores."""
    floor: float = Field(1e-3, gt=0, lt=1)
    """Scores below this count as this, so that log R stays finite (units of the score)."""
    ramp_steps: float = Field(0.0, ge=0)
    """Learner steps over which beta rises from 1 towards `exponent` (half-way after this many); 0: no ramp."""


def reward_exponent(config: RewardConfig, step: int) -> float:
    """beta(n) = 1 + (beta - 1)(1 - 1/(1 + n/ramp)); beta itself without a ramp."""
    if config.ramp_steps == 0:
        return config.exponent
    return 1 + (config.exponent - 1) * (1 - 1 / (1 + step / config.ramp_steps))


def log_reward(scores: Tensor, config: RewardConfig, *, step: float = math.inf) -> Tensor:
    """log R at learner step `step` (default: the final reward); same shape as `scores`."""
    exponent = config.exponent if step == math.inf else reward_exponent(config, int(step))
    return exponent * torch.log(torch.clamp(scores, min=config.floor))


def valid_scores(scores: np.ndarray) -> np.ndarray:
    """bool [B]: which of `scores` float [B] are finite and not negative; trajectories with another are rejected."""
    with np.errstate(invalid="ignore"):
        return np.isfinite(scores) & (scores >= 0)


def valid_log_rewards(scores: np.ndarray, reward: RewardConfig) -> np.ndarray:
    """float64 [B]: log R of the final reward, minus infinity where a score of `scores` float [B] is not valid."""
    valid = valid_scores(scores)
    log_rewards = log_reward(torch.from_numpy(np.where(valid, scores, 0)), reward).double().numpy()
    return np.where(valid, log_rewards, -np.inf)
