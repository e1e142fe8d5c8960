"""Thin Ray shells around the plain classes that do the work."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.replay_buffer import Draw
from actors.rollout import RolloutReport
from actors.trajectories import TrajectoryBatch, concatenate
from distributed.checkpoints import restore_learner, save_learner, start_from
from distributed.config import ExperimentConfig
from distributed.experiment import make_learner, make_rollout_worker
from distributed.local_backend import OFFLINE_STEPS, learn
from learner.gflownet import EvaluationWeights


class RolloutActor:
    """A rollout worker in a process of its own; while the scores of one batch are waited for, others are drawn."""

    def __init__(self, config: ExperimentConfig, index: int, incarnation: int):
        torch.set_num_threads(1)
        self._worker = make_rollout_worker(config, index, incarnation)
        self._loaded, self._lock = -1, threading.Lock()

    def ready(self) -> int:
        """Process id, once everything is loaded."""
        return os.getpid()

    @ray.method(num_returns=2)
    def rollout(self, weights: np.ndarray, version: int) -> tuple[TrajectoryBatch, RolloutReport]:
        """A batch drawn with `weights` of `version`; batch and report are separate objects, so that the driver
        fetches only the report."""
        with self._lock:
            if version > self._loaded:  # calls may overtake each other
                self._worker.set_weights(weights, version)
                self._loaded = version
            drawn = self._worker.draw()
        return self._worker.score(drawn)

    @ray.method(num_returns=2)
    def rollout_offline(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[TrajectoryBatch, RolloutReport]:
        """Given sequences pushed through the noise process."""
        with self._lock:
            drawn = self._worker.draw_offline(tokens, lengths)
        return self._worker.score(drawn)

    @ray.method(num_returns=2)
    def rollout_designs(self, designs: np.ndarray) -> tuple[TrajectoryBatch, RolloutReport]:
        """Sequences of the learner's, scored."""
        with self._lock:
            drawn = self._worker.draw_offline(designs, np.full(len(designs), designs.shape[1]))
        return self._worker.score(drawn)


class LearnerActor:
    """The learner in a process of its own, on the GPU where it was given one."""

    def __init__(self, config: ExperimentConfig, checkpoint: Path | None):
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self._config, self._learner = config, make_learner(config)
        if checkpoint is not None:
            restore_learner(self._learner, checkpoint)
        else:
            start_from(self._learner, config)
        self._busy_seconds, self._started = 0.0, time.perf_counter()

    def ready(self) -> int:
        """Process id, once everything is loaded."""
        return os.getpid()

    @ray.method(num_returns=2)
    def update(self, draw: Draw, *fresh: TrajectoryBatch) -> tuple[dict[str, float], np.ndarray]:
        """Train on the `fresh` batches and the drawn trajectories; metrics and the new policy weights are separate objects."""
        start = time.perf_counter()
        metrics = learn(self._learner, concatenate(fresh), draw)
        self._busy_seconds += time.perf_counter() - start
        share = self._busy_seconds / (time.perf_counter() - self._started)
        metrics |= {
            "step": self._learner.step,
            "learner_utilisation": share,
            "learner_cpu_seconds": time.process_time(),
        }
        return metrics, self._learner.weights()

    def is_offline(self) -> bool:
        """Whether the next step needs no rollouts."""
        return self._learner.is_offline

    @ray.method(num_returns=2)
    def offline_update(self) -> tuple[dict[str, float], np.ndarray]:
        """Train on offline data; as `update`, with `is_offline` among the metrics."""
        metrics = self._learner.offline_update(OFFLINE_STEPS)
        metrics |= {"step": self._learner.step, "learner_utilisation": 1.0, "learner_cpu_seconds": time.process_time()}
        return metrics | {"is_offline": self._learner.is_offline}, self._learner.weights()

    def take_designs(self) -> np.ndarray:
        """Sequences int16 [n, L] of the last call that the oracle shall score."""
        return self._learner.take_designs()

    def weights(self) -> np.ndarray:
        """Policy parameters for rollouts."""
        return self._learner.weights()

    def evaluation_weights(self) -> EvaluationWeights:
        """The averaged policy and the dynamics model."""
        return self._learner.evaluation_weights()

    def save(self, folder: Path) -> None:
        """Write the learner into `folder`."""
        save_learner(self._learner, self._config, folder)


_remote: Any = ray.remote  # its type stubs do not know these options
_no_restarts = {"max_restarts": 0, "max_task_retries": 0}  # the driver replaces the dead: it knows their state
RemoteRolloutActor = _remote(**_no_restarts)(RolloutActor)
RemoteLearnerActor = _remote(**_no_restarts)(LearnerActor)
