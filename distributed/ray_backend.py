"""The Ray backend: rollout actors, a buffer actor and a learner actor, kept busy by a driver that moves only references.

A rollout's batch goes by reference to the buffer and to the learner. Dead actors are replaced a bounded number of
times: rollout actors with a new seed, buffer and learner from the newest checkpoint.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from actors.rollout import RolloutReport
from distributed.backend import Accounting, RunFailed, StepResult
from distributed.checkpoints import STATE_FILE, CheckpointStore, load_state
from distributed.config import ExperimentConfig
from distributed.experiment import make_environment, make_oracle, num_dynamics_trajectories, offline_sequences
from distributed.ray_actors import RemoteLearnerActor, RemoteReplayBufferActor
from distributed.ray_calls import FreshBatch, Pending, Slot
from distributed.ray_faults import INFRASTRUCTURE, cause, last_line, node_died, raise_if_fault, reason
from distributed.ray_runtime import DRIVER_BUNDLE, LEARNER_BUNDLE, beside_driver, connect, learner_gpus
from distributed.rollout_pool import RolloutPool
from learner.gflownet import EvaluationWeights

logger = logging.getLogger(__name__)
MAX_INCARNATIONS = 1_000_000
"""Restarts of an actor for which a session has names and seeds of its own."""
MAX_UPDATES_IN_FLIGHT = 2
MAX_ADDS_IN_FLIGHT = 8
POLL_SECONDS = 0.2


class RayBackend:
    """Bounded queues between N rollout actors, one buffer and one learner."""

    def __init__(self, config: ExperimentConfig, store: CheckpointStore):
        self.config, self.store, self.accounting = config, store, Accounting()
        self._pending: dict[Any, Pending] = {}
        self._fresh: deque[FreshBatch] = deque()
        self._unsent: list[Pending] = []
        self._numbers: Counter[str] = Counter()
        self._cpu: dict[str, float] = {}
        self._earlier_cpu_seconds, self._session = 0.0, 0
        self._weights: Any = None
        self._owns_ray = False
        self._pool = RolloutPool(config, 0)

    def start(self, checkpoint: Path | None) -> None:
        """Connect, make the actors (from `checkpoint`, if given), and prefill the offline data if there is no checkpoint."""
        self._owns_ray = connect(self.config)
        if checkpoint is not None:
            state = load_state(checkpoint)["backend"]
            self.accounting.load_state_dict(state["accounting"])
            if type(state.get("session")) is not int:
                raise RunFailed(f"{checkpoint / STATE_FILE}: damaged (session: allowed is a whole number)")
            self._session = state["session"] + 1
        self._earlier_cpu_seconds = self.accounting.cpu_seconds
        first = self._session * MAX_INCARNATIONS
        self._learner = Slot("learner", 0, self._make_learner(checkpoint), first)
        self._buffer = Slot("buffer", 0, self._make_buffer(checkpoint), first)
        self._pool = RolloutPool(self.config, first)
        self._pool.start()
        _, num_stored = self._ask(lambda: self._buffer.handle.ready.remote())
        self.accounting.set_stored(num_stored)
        self._weights = ray.put(self._ask(lambda: self._learner.handle.weights.remote()))
        if checkpoint is None:
            self._prefill()

    def _make_learner(self, checkpoint: Path | None) -> Any:
        actors = self.config.actors
        options = RemoteLearnerActor.options(
            num_cpus=actors.learner_num_cpus,
            num_gpus=learner_gpus(self.config),
            scheduling_strategy=beside_driver(LEARNER_BUNDLE),
        )
        return options.remote(self.config, checkpoint)

    def _make_buffer(self, checkpoint: Path | None) -> Any:
        return RemoteReplayBufferActor.options(scheduling_strategy=beside_driver(DRIVER_BUNDLE)).remote(
            self.config, checkpoint
        )

    def _prefill(self) -> None:
        if self.config.replay.offline_source == "none":
            return
        environment = make_environment(self.config)
        oracle = make_oracle(self.config, environment)
        offline = offline_sequences(self.config, environment, oracle)
        oracle.close()
        assert offline is not None
        tokens, lengths = offline
        size = self.config.actors.batch_size
        slices = [
            (tokens[start : start + size], lengths[start : start + size]) for start in range(0, len(tokens), size)
        ]
        batches = []
        slots = self._pool.slots
        for start in range(0, len(slices), len(slots)):
            now = slices[start : start + len(slots)]
            calls = [slot.handle.rollout_offline.remote(*given) for slot, given in zip(slots, now, strict=False)]
            batches += [self._offline_batch(*item) for item in zip(slots, now, calls, strict=False)]
        self._ask(lambda: self._buffer.handle.set_offline.remote(*batches))

    def _offline_batch(self, slot: Slot, given: tuple[Any, Any], call: tuple[Any, Any]) -> Any:
        """Reference of an offline batch; if its actor dies, the next one in that place draws it."""
        while True:
            batch, report = call
            try:
                done = ray.get(report, timeout=self.config.actors.timeout_seconds)
            except (RayTaskError, *INFRASTRUCTURE) as error:
                raise_if_fault(error)
                self._restart(slot, error)
                call = slot.handle.rollout_offline.remote(*given)
            else:
                self.accounting.count_offline(done)
                return batch

    def step(self) -> StepResult | None:
        """Serve whatever call ends next until one of the learner's does; None after a second without."""
        self._replace_overdue()
        self._forget(self._pool.adjust())
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            self._submit_rollouts()
            self._submit_updates()
            ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
            for reference in ready:
                result = self._finish(reference)
                if result is not None:
                    return result
        return None

    def drain(self) -> StepResult | None:
        """Finish what the learner and the buffer were given; rollouts under way are forgotten, and never counted."""
        last = None
        while calls := [reference for reference, call in self._pending.items() if call.kind != "rollout"]:
            ready, _ = ray.wait(calls, num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
            if not ready:
                self._replace_overdue()
            for reference in ready:
                last = self._finish(reference) or last
        return last

    def _forget(self, retired: list[Slot]) -> None:
        """Rollouts under way at actors that were given up never arrive, and are never counted."""
        for reference, call in list(self._pending.items()):
            if call.slot in retired:
                del self._pending[reference]

    def _submit_rollouts(self) -> None:
        """Keep the rollout actors busy, unless learner or buffer lag behind."""
        calls = Counter(id(p.slot) for p in self._pending.values() if p.kind == "rollout")
        adds = sum(p.kind == "add" for p in self._pending.values())
        room = len(self._pool.slots) * self.config.actors.max_in_flight + 1 - len(self._fresh) - calls.total()
        for depth in range(self.config.actors.max_in_flight):
            for slot in self._pool.slots:
                if adds >= MAX_ADDS_IN_FLIGHT or room <= 0:
                    return
                if calls[id(slot)] > depth:
                    continue
                batch, report = slot.handle.rollout.remote(self._weights, self.accounting.policy_version)
                self._track(report, "rollout", slot, batch=batch, source=slot.source)
                calls[id(slot)] += 1
                room -= 1

    def _submit_updates(self) -> None:
        updates = sum(p.kind == "update" for p in self._pending.values())
        limit = self.config.actors.policy_lag_limit(len(self._pool.slots))
        while self._fresh and updates < MAX_UPDATES_IN_FLIGHT:
            fresh = self._fresh.popleft()
            if self.accounting.policy_version + updates - fresh.version > limit:
                self.accounting.num_stale += fresh.count
                continue
            num_dynamics = num_dynamics_trajectories(self.config, fresh.count)
            draw = self._buffer.handle.draw.remote(fresh.count, num_dynamics)
            metrics, weights = self._learner.handle.update.remote(fresh.reference, draw)
            self._track(
                metrics, "update", self._learner,
                batch=fresh.reference, count=fresh.count, version=fresh.version, weights=weights,
            )  # fmt: skip
            updates += 1

    def _submit_add(self, batch: Any, count: int, source: str, number: int) -> None:
        reference = self._buffer.handle.add.remote(batch, source, number)
        self._track(reference, "add", self._buffer, batch=batch, count=count, source=source, number=number)

    def _track(self, reference: Any, kind: str, slot: Slot, **details: Any) -> None:
        self._pending[reference] = Pending(kind, slot, slot.handle, self._deadline(), **details)

    def _deadline(self) -> float:
        return time.monotonic() + self.config.actors.timeout_seconds

    def _finish(self, reference: Any) -> StepResult | None:
        call = self._pending.pop(reference)
        for queued in self._pending.values():  # time spent behind this call does not count against them
            if queued.handle is call.handle:
                queued.deadline = self._deadline()
        try:
            value = ray.get(reference, timeout=self.config.actors.timeout_seconds)
        except (RayTaskError, *INFRASTRUCTURE) as error:
            self._failed(call, error)
            return None
        if call.kind == "rollout":
            self._rollout_done(call, value)
        elif call.kind == "add":
            self._add_done(call, value)
        else:
            return self._update_done(call, value)
        return None

    def _rollout_done(self, call: Pending, report: RolloutReport) -> None:
        self._cpu[call.source] = report.cpu_seconds
        count = self.accounting.count_rollout(report)
        if not count:
            return
        self.accounting.num_in_flight += count
        self._submit_add(call.batch, count, call.source, self._numbers[call.source])
        self._numbers[call.source] += 1
        self._fresh.append(FreshBatch(call.batch, count, report.policy_version))

    def _add_done(self, call: Pending, accepted: int) -> None:
        """A batch that the buffer already had before it was restored is among those that `set_stored` counted."""
        self.accounting.num_in_flight -= call.count
        self.accounting.num_stored += accepted
        self.accounting.num_lost += call.count - accepted

    def _update_done(self, call: Pending, metrics: dict[str, float]) -> StepResult:
        accounting = self.accounting
        accounting.lags.append(accounting.policy_version - call.version)
        accounting.policy_version += 1
        accounting.num_trained += call.count
        self._weights = call.weights
        self._cpu[self._learner.source] = metrics.pop("learner_cpu_seconds")
        accounting.cpu_seconds = self._earlier_cpu_seconds + time.process_time() + sum(self._cpu.values())
        return StepResult(int(metrics.pop("step")), metrics | {"num_rollout_actors": len(self._pool.slots)})

    def _failed(self, call: Pending, error: Exception) -> None:
        """Recover from a failed call, or raise RunFailed if it was no matter of a dead process or node."""
        raise_if_fault(error)
        if call.kind == "rollout":
            if call.handle is not call.slot.handle or call.slot not in self._pool.slots:
                return  # already replaced, or given up
            if self._pool.is_auto and node_died(error):
                self._forget([self._pool.retire(call.slot)])
            else:
                self._restart(call.slot, error)
            return
        lost = isinstance(cause(error), ObjectLostError)  # its node died with the batch
        if call.kind == "add" and not lost:
            self._unsent.append(call)
        self._replace_dead(error)
        if call.kind == "update" and not lost:
            self._fresh.appendleft(FreshBatch(call.batch, call.count, call.version))
        elif call.kind == "add" and lost:
            self.accounting.num_in_flight -= call.count
            self.accounting.num_lost += call.count
        self._resend()

    def _resend(self) -> None:
        """Add again what did not arrive, in the order of the numbers, by which the buffer knows duplicates."""
        unsent, self._unsent = sorted(self._unsent, key=lambda call: call.number), []
        for call in unsent:
            self._submit_add(call.batch, call.count, call.source, call.number)

    def _replace_overdue(self) -> None:
        now = time.monotonic()
        for reference, call in list(self._pending.items()):
            if call.deadline < now and reference in self._pending:
                del self._pending[reference]
                ray.kill(call.handle, no_restart=True)
                self._failed(call, GetTimeoutError(f"{call.source or call.slot.role} gave no answer in time"))

    def _replace_dead(self, error: Exception) -> None:
        """Replace learner and buffer if they do not answer."""
        for slot in (self._learner, self._buffer):
            try:
                ray.get(slot.handle.ready.remote(), timeout=self.config.actors.timeout_seconds)
            except INFRASTRUCTURE as silence:
                self._restart(slot, silence if isinstance(silence, RayActorError) else error)

    def _restart(self, slot: Slot, error: Exception) -> None:
        raise_if_fault(error)
        if slot.restarts >= self.config.actors.max_restarts:
            raise RunFailed(f"{slot.role} {slot.index} died {slot.restarts + 1} times; last: {reason(error)}")
        ray.kill(slot.handle, no_restart=True)
        slot.restarts += not node_died(error)  # nodes may come and go for days
        slot.incarnation += 1
        self.accounting.num_restarts += 1
        logger.warning("%s %d died (%s); restart %d of at most %d, incarnation %d",
                       slot.role, slot.index, reason(error), slot.restarts,
                       self.config.actors.max_restarts, slot.incarnation)  # fmt: skip
        checkpoint = next(iter(self.store.newest_first()), None)
        if slot.role == "rollout":
            self._pool.refill(slot)
        elif slot.role == "learner":
            slot.handle = self._make_learner(checkpoint)
            self._weights = ray.put(self._ask(lambda: slot.handle.weights.remote()))
            self.accounting.policy_version += 1
        else:
            waiting = [reference for reference, call in self._pending.items() if call.kind == "add"]
            self._unsent += [self._pending.pop(reference) for reference in waiting]
            slot.handle = self._make_buffer(checkpoint)
            _, num_stored = self._ask(lambda: slot.handle.ready.remote())
            self.accounting.set_stored(num_stored)
            self._resend()

    def _ask(self, call: Callable[[], Any], tries: int = 3) -> Any:
        """The answer to a call of learner or buffer; replaces them if they die meanwhile."""
        for attempt in range(tries):
            try:
                return ray.get(call(), timeout=self.config.actors.timeout_seconds)
            except (RayTaskError, *INFRASTRUCTURE) as error:
                raise_if_fault(error)
                if attempt + 1 == tries:
                    raise RunFailed(f"no answer after {tries} tries: {reason(error)}") from error
                self._replace_dead(error)

    def evaluation_weights(self) -> EvaluationWeights:
        """The averaged policy and the dynamics model."""
        return self._ask(lambda: self._learner.handle.evaluation_weights.remote())

    def statistics(self) -> dict[str, float]:
        """State of the replay buffer, and of the queues."""
        statistics = self._ask(lambda: self._buffer.handle.statistics.remote())
        self._cpu[self._buffer.source] = statistics.pop("buffer_cpu_seconds")
        return statistics | {"num_waiting_batches": len(self._fresh)}

    def save(self, folder: Path) -> dict[str, Any]:
        """Have learner and buffer write themselves; raises OSError if they cannot, or died meanwhile."""
        calls = [slot.handle.save.remote(folder) for slot in (self._learner, self._buffer)]
        try:
            ray.get(calls, timeout=self.config.actors.timeout_seconds)
        except (RayTaskError, *INFRASTRUCTURE) as error:
            if isinstance(cause(error), OSError):
                raise OSError(last_line(error)) from error
            raise_if_fault(error)
            self._replace_dead(error)
            raise OSError(reason(error)) from error
        return {"accounting": self.accounting.state_dict(), "session": self._session}

    def close(self) -> None:
        """End all actors, and Ray if this backend started it."""
        if not ray.is_initialized():
            return
        for slot in (getattr(self, name) for name in ("_learner", "_buffer") if hasattr(self, name)):
            ray.kill(slot.handle, no_restart=True)
        self._pool.close()
        self._pending.clear()
        self._fresh.clear()
        if self._owns_ray:
            ray.shutdown()
