"""Masking schedules of absorbing diffusion: how likely a token is masked at time t (MDLM, arXiv 2406.07524).

t = 0 is clean and t = 1 all masked. The grid of N reverse steps is t_k = k/N, walked from k = N to 1.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

ScheduleName = Literal["log_linear", "cosine"]


class MaskingSchedule(ABC):
    """m(t): increasing, m(0) = 0, m(1) = 1."""

    @abstractmethod
    def mask_prob(self, t: Tensor) -> Tensor:
        """m(t), the probability that a token is masked at time t in [0, 1]."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """m'(t)/m(t) for t in (0, 1]: weight of the masked tokens' cross-entropy in the NELBO."""

    def unmask_prob(self, t: Tensor, s: Tensor) -> Tensor:
        """(m(t) - m(s))/m(t): the probability that a position masked at t is revealed by s < t."""
        masked = self.mask_prob(t)
        return (masked - self.mask_prob(s)) / masked

    def reveal_probs(self, num_steps: int) -> Tensor:
        """float64 [N]: m(t_k) - m(t_{k-1}), the probability that a position is revealed in step k = 1..N."""
        return self.mask_prob(grid(num_steps)).diff()

    def unmask_probs(self, num_steps: int) -> Tensor:
        """float64 [N]: `unmask_prob(t_k, t_{k-1})` of the steps k = 1..N; 1/k for the log-linear schedule."""
        times = grid(num_steps)
        return self.unmask_prob(times[1:], times[:-1])


class LogLinear(MaskingSchedule):
    """m(t) = t, the log-linear schedule with eps = 0: the start is exactly all masked, the last step reveals the rest."""

    def mask_prob(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def weight(self, t: Tensor) -> Tensor:
        """1/t."""
        return 1 / t


class Cosine(MaskingSchedule):
    """m(t) = 1 - cos(πt/2): few tokens are masked for most of the time."""

    def mask_prob(self, t: Tensor) -> Tensor:
        """1 - cos(πt/2), written as 2 sin²(πt/4), which keeps its digits at small t."""
        return 2 * torch.sin(math.pi / 4 * t).square()

    def weight(self, t: Tensor) -> Tensor:
        """(π/2) sin(πt/2) / (1 - cos(πt/2)) = (π/2) cot(πt/4)."""
        return math.pi / 2 / torch.tan(math.pi / 4 * t)


LOG_LINEAR = LogLinear()
SCHEDULES: dict[ScheduleName, MaskingSchedule] = {"log_linear": LOG_LINEAR, "cosine": Cosine()}


def grid(num_steps: int) -> Tensor:
    """float64 [N+1]: t_k = k/N for k = 0..N."""
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be at least 1")
    return torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
