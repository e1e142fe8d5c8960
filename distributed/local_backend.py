"""The serial backend: rollout, replay and learner in one process, in a fixed order, reproducible to the bit."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from actors.replay_buffer import Draw, ReplayBuffer
from actors.rollout import RolloutWorker
from actors.trajectories import TrajectoryBatch, mix
from distributed.backend import Accounting, RunFailed, StepResult
from distributed.checkpoints import BUFFER_FILE, STATE_FILE, load_state, restore_learner, save_learner, start_from
from distributed.config import ExperimentConfig
from distributed.experiment import (
    Learner,
    actor_seeds,
    make_learner,
    make_replay_buffer,
    make_rollout_worker,
    num_dynamics_trajectories,
    offline_sequences,
)
from learner.drakes.learner import DrakesLearner
from learner.gflownet import EvaluationWeights

SOURCE = "serial"
OFFLINE_STEPS = 20
"""Steps of a call in which the learner trains on offline data only."""


class SerialBackend:
    """One worker, one buffer, one learner."""

    def __init__(self, config: ExperimentConfig):
        self.config, self.accounting = config, Accounting()
        self.learner = make_learner(config)
        self.buffer: ReplayBuffer = make_replay_buffer(config)
        self.worker: RolloutWorker = make_rollout_worker(config, index=0)
        self._number, self._earlier_cpu_seconds = 0, 0.0

    def start(self, checkpoint: Path | None) -> None:
        """Restore everything, generators of random numbers included, or prefill the offline data."""
        if checkpoint is None:
            start_from(self.learner, self.config)
            offline = offline_sequences(self.config, self.worker.environment, self.worker.oracle)
            if offline is not None:
                batch, report = self.worker.rollout_offline(*offline)
                self.accounting.count_offline(report)
                self.buffer.set_offline(batch)
        else:
            restore_learner(self.learner, checkpoint)
            self.buffer.load(checkpoint / BUFFER_FILE)
            state = load_state(checkpoint)["backend"]
            self.accounting.load_state_dict(state["accounting"])
            try:
                self.worker.load_state_dict(state["worker"])
                self._number = int(state["number"])
            except (LookupError, TypeError, ValueError, OverflowError) as error:
                raise RunFailed(f"{checkpoint / STATE_FILE}: damaged ({error})") from error
        self._earlier_cpu_seconds = self.accounting.cpu_seconds - time.process_time()

    def step(self) -> StepResult | None:
        """Draw, store, learn, hand the weights over; None if every trajectory was rejected."""
        if self.learner.is_offline:
            metrics = self.learner.offline_update(OFFLINE_STEPS)
            self.accounting.cpu_seconds = self._earlier_cpu_seconds + time.process_time()
            return StepResult(self.learner.step, metrics)
        self.worker.set_weights(self.learner.weights(), self.accounting.policy_version)
        fresh, report = self.worker.rollout()
        accounting = self.accounting
        if not accounting.count_rollout(report):
            return None
        accounting.num_stored += self.buffer.add(fresh, SOURCE, self._number)
        self._number += 1
        draw = self.buffer.draw(len(fresh), num_dynamics_trajectories(self.config, len(fresh)))
        metrics = learn(self.learner, fresh, draw)
        self._score_designs()
        accounting.num_trained += len(fresh)
        accounting.policy_version += 1
        accounting.lags.append(0)
        accounting.cpu_seconds = self._earlier_cpu_seconds + time.process_time()
        metrics |= {"rollout_seconds": report.rollout_seconds, "oracle_seconds": report.oracle_seconds}
        return StepResult(self.learner.step, metrics)

    def _score_designs(self) -> None:
        """Sequences that the learner wants to know more of go through the oracle into the buffer."""
        designs = self.learner.take_designs()
        if len(designs):
            batch, report = self.worker.rollout_offline(designs, np.full(len(designs), designs.shape[1]))
            if self.accounting.count_rollout(report):
                self.accounting.num_stored += self.buffer.add(batch, SOURCE, self._number)
                self._number += 1

    def drain(self) -> None:
        """Nothing is ever under way."""

    def evaluation_weights(self) -> EvaluationWeights:
        """The averaged policy and the dynamics model."""
        return self.learner.evaluation_weights()

    def statistics(self) -> dict[str, float]:
        """State of the replay buffer."""
        return self.buffer.statistics()

    def seeds(self) -> dict[str, int]:
        """Of learner, buffer and the one worker."""
        return actor_seeds(self.config, [(0, 0)])

    def save(self, folder: Path) -> dict[str, Any]:
        """Write learner and buffer; returns counters and the worker's generator."""
        save_learner(self.learner, self.config, folder)
        self.buffer.save(folder / BUFFER_FILE)
        return {
            "accounting": self.accounting.state_dict(),
            "worker": self.worker.state_dict(),
            "number": self._number,
        }

    def close(self) -> None:
        """Release the oracle."""
        self.worker.oracle.close()


def learn(learner: Learner, fresh: TrajectoryBatch, draw: Draw) -> dict[str, float]:
    """One call of the learner with `fresh` trajectories and what the buffer drew: replayed ones join the fresh ones."""
    if isinstance(learner, DrakesLearner):
        return learner.update(fresh, bank=draw.banked)
    return learner.update(mix([fresh] if draw.policy is None else [fresh, draw.policy]), draw.dynamics)
