"""Noise processes: which token is realised when another was intended.

Shapes: T steps, A actions, B trajectories. A process is its kernel K_t(x|a), float64 [T, A, A] with the intended action
first; a forbidden action has an empty (all-zero) row. A new process is a class with this one method.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class NoiseProcess(Protocol):
    """Gives the kernel on the allowed actions of each step."""

    def kernel(self, allowed: np.ndarray) -> np.ndarray:
        """float64 [T, A, A] from `allowed` bool [T, A]."""
        ...


@dataclass(frozen=True)
class UniformSubstitution:
    """With probability `alpha` the intended token is replaced by a uniformly drawn allowed one (perhaps the same)."""

    alpha: float

    def kernel(self, allowed: np.ndarray) -> np.ndarray:
        """K_t(x|a) = (1-α)·1[x = a] + α/|allowed_t|."""
        uniform = allowed / allowed.sum(-1, keepdims=True)
        kernel = (1 - self.alpha) * np.eye(allowed.shape[1]) + self.alpha * uniform[:, None, :]
        return np.where(allowed[:, :, None], kernel, 0.0)


@dataclass(frozen=True)
class NeighbourSubstitution:
    """With probability `alpha` the intended token is replaced by the one before or after it, where tokens have an order."""

    alpha: float

    def kernel(self, allowed: np.ndarray) -> np.ndarray:
        """K_t(x|a) = (1-α)·1[x = a] + α·1[|x - a| = 1] / number of neighbours; all tokens must be allowed."""
        assert allowed.all()
        size = allowed.shape[1]
        neighbours = np.eye(size, k=1) + np.eye(size, k=-1)
        kernel = (1 - self.alpha) * np.eye(size) + self.alpha * neighbours / neighbours.sum(1, keepdims=True)
        return np.repeat(kernel[None], len(allowed), 0)


class NoiseSampler:
    """Draws realised tokens from a kernel, one uniform number each."""

    def __init__(self, kernel: np.ndarray):
        self._thresholds = np.cumsum(kernel, -1)
        self._thresholds /= np.maximum(self._thresholds[..., -1:], 1e-300)
        self._thresholds[self._thresholds >= 1 - 1e-12] = np.inf  # rounding must let no forbidden outcome through
        self._exact = bool(np.abs(kernel - np.eye(kernel.shape[-1])).max() == 0)

    def realise(self, step: int, actions: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Realised tokens [B] for intended `actions` int [B] at `step`, from `uniforms` float [B] in [0, 1)."""
        if self._exact:
            return actions
        return (uniforms[:, None] >= self._thresholds[step, actions]).sum(1)
