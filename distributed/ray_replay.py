"""The replay buffer as a Ray actor. Nothing here imports PyTorch: its process holds the trajectories, and little else."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from actors.replay_buffer import Draw, ReplayBuffer
from actors.trajectories import TrajectoryBatch, concatenate


class ReplayBufferActor:
    """The replay buffer; adds and draws queue separately and share the data under a lock."""

    def __init__(self, make: Callable[[], ReplayBuffer], saved: Path | None):
        """`make` gives the empty buffer, `saved` is a file of what was in it."""
        self._buffer, self._lock = make(), threading.Lock()
        if saved is not None:
            self._buffer.load(saved)

    @ray.method(concurrency_group="read")
    def ready(self) -> tuple[int, int]:
        """Process id, and the number of trajectories stored so far."""
        return os.getpid(), self._buffer.num_added

    @ray.method(concurrency_group="write")
    def add(self, batch: TrajectoryBatch, source: str, number: int) -> int:
        """Store the `number`-th batch of `source`; returns the trajectories accepted."""
        with self._lock:
            return self._buffer.add(batch, source, number)

    @ray.method(concurrency_group="write")
    def set_offline(self, *batches: TrajectoryBatch) -> int:
        """Replace the offline trajectories; returns their number."""
        with self._lock:
            self._buffer.set_offline(concatenate(batches))
            return self._buffer.num_offline

    @ray.method(concurrency_group="read")
    def draw(self, num_fresh: int, num_dynamics: int) -> Draw:
        """Replayed trajectories for one call of the learner."""
        with self._lock:
            return self._buffer.draw(num_fresh, num_dynamics)

    @ray.method(concurrency_group="read")
    def statistics(self) -> dict[str, float]:
        """Size, counts, scores, and CPU time of this process."""
        with self._lock:
            return self._buffer.statistics() | {"buffer_cpu_seconds": time.process_time()}

    @ray.method(concurrency_group="read")
    def save(self, file: Path) -> None:
        """Write everything into `file`."""
        with self._lock:
            self._buffer.save(file)


_remote: Any = ray.remote  # its type stubs do not know concurrency groups
RemoteReplayBufferActor = _remote(  # the driver replaces the dead: it knows their state
    max_restarts=0, max_task_retries=0, num_cpus=0, concurrency_groups={"write": 1, "read": 1}
)(ReplayBufferActor)
