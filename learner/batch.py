"""A batch of trajectories as the learner holds it. Shapes: B batch, T steps, A actions, N distinct prefixes."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from learner.networks.prefixes import index_prefixes, join_symbols, num_symbols
from learner.objectives.balance import step_mask


class Trajectories(Protocol):
    """The arrays of a trajectory batch that the learner reads."""

    @property
    def tokens(self) -> np.ndarray:
        """int [B, T]: realised."""

    @property
    def actions(self) -> np.ndarray:
        """int [B, T]: intended."""

    @property
    def num_steps(self) -> np.ndarray:
        """int [B]."""

    @property
    def scores(self) -> np.ndarray:
        """float [B]: raw scores."""

    @property
    def log_behaviour(self) -> np.ndarray:
        """float [B, T]: log-prob of each intended action when it was drawn; NaN: not known."""

    @property
    def contexts(self) -> np.ndarray:
        """int [B]: number of the window that each continues; 0 where there is none."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> "Trajectories": ...


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` as a tensor on `device`; to a GPU from page-locked memory, without waiting for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class TensorBatch:
    """Trajectories on the learner's device, with the index of their distinct prefixes.

    With `thought_context`, prefixes are told apart by their intended tokens too.
    """

    def __init__(
        self, batch: Trajectories, num_actions: int, device: torch.device, *, finished: bool, thought_context: bool
    ):
        pairs = join_symbols(batch.tokens, batch.actions, num_actions, thought_context)
        size = num_symbols(num_actions, thought_context)
        self.contexts, of_context = np.unique(batch.contexts, return_inverse=True)
        """int [n]: numbers of the distinct windows; `of_context` int64 [B] is the row of each trajectory's."""
        self.of_context = to_device(of_context, device)
        index = index_prefixes(pairs, batch.num_steps, size, finished=finished, contexts=of_context)
        self.rows, self.inverse = to_device(index.rows, device), to_device(index.inverse, device)
        self.tokens = to_device(batch.tokens.astype(np.int64), device)
        self.actions = to_device(batch.actions.astype(np.int64), device)
        self.num_steps = to_device(batch.num_steps.astype(np.int64), device)
        self.scores = to_device(np.array(batch.scores, dtype=np.float32), device)
        self.log_behaviour = to_device(np.array(batch.log_behaviour, dtype=np.float32), device)
        self.mask = step_mask(self.num_steps, self.tokens.shape[1])
        self._pairs = to_device(pairs, device)

    def symbols(self, thought_context: bool) -> Tensor:
        """What a network with or without a thought context reads, int64 [B, T]."""
        return self._pairs if thought_context else self.tokens

    def of_prefixes(self, values: Tensor) -> Tensor:
        """From values [N, ...] of distinct prefixes to [B, T+1, ...] of all."""
        return values[self.inverse]
