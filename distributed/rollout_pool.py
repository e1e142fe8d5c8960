"""The rollout actors of a run: a fixed number, or as many as the cluster has room for, coming and going with its nodes."""

import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, RayTaskError

from actors.rollout import ActorsConfig
from distributed.backend import Accounting, RunFailed
from distributed.config import ExperimentConfig
from distributed.ray_actors import RemoteRolloutActor
from distributed.ray_calls import Calls, Pending, Slot
from distributed.ray_faults import INFRASTRUCTURE, cause, count_death, node_died
from distributed.ray_runtime import over_nodes

logger = logging.getLogger(__name__)
ADJUST_SECONDS = 2.0
"""How often the cluster's nodes are looked at, with actors.num_rollout_actors: auto."""
TRACE = 0.001
"""Share of `actors.rollout_resource` that an actor takes: it only says where the actor may run."""


class RolloutPool:
    """Places for rollout actors, the actors in them, and the weights they draw with."""

    def __init__(self, config: ExperimentConfig, calls: Calls, accounting: Accounting):
        self.config, self.slots, self.version = config, list[Slot](), 0
        self._calls, self._accounting = calls, accounting
        self._weights: Any = None
        self._first, self._next_index, self._looked, self._num_given_up = 0, 0, 0.0, 0
        self.made: list[tuple[int, int]] = []
        """Index and incarnation of every actor there was."""
        self.is_auto = config.actors.num_rollout_actors == "auto"

    def start(self, first_incarnation: int) -> None:
        """Make the actors; asks an autoscaling cluster for room for the most that there may be."""
        actors = self.config.actors
        self._first = first_incarnation
        if self.is_auto and actors.max_rollout_actors is not None:
            _request([rollout_resources(actors)] * actors.max_rollout_actors)
        self._grow(self.room() if actors.num_rollout_actors == "auto" else actors.num_rollout_actors)

    def set_weights(self, weights: Any, version: int) -> None:
        """Have all rollouts from now on drawn with the weights of this reference."""
        self._weights, self.version = weights, version

    def submit(self, num_waiting: int) -> None:
        """Keep the actors busy, but for `num_waiting` batches that the learner did not come to yet."""
        in_flight, now = self.config.actors.max_in_flight, time.monotonic()
        room = len(self.slots) * in_flight + 1 - num_waiting - self._calls.count("rollout")
        for depth in range(in_flight):
            for slot in self.slots:
                if room <= 0:
                    return
                if slot.num_calls > depth or slot.retry_at > now:
                    continue
                batch, report = slot.handle.rollout.remote(self._weights, self.version)
                self._calls.add(report, Pending("rollout", slot, slot.handle, batch=batch, source=slot.source))
                room -= 1

    def draw_offline(self, tokens: np.ndarray, lengths: np.ndarray) -> list[Any]:
        """References of batches of given sequences pushed through the noise process, all actors sharing the work."""
        size, slots = self.config.actors.batch_size, self.slots
        slices = [
            (tokens[start : start + size], lengths[start : start + size]) for start in range(0, len(tokens), size)
        ]
        batches = []
        for start in range(0, len(slices), len(slots)):
            now = slices[start : start + len(slots)]
            calls = [slot.handle.rollout_offline.remote(*given) for slot, given in zip(slots, now, strict=False)]
            batches += [self._offline_batch(*item) for item in zip(slots, now, calls, strict=False)]
        return batches

    def _offline_batch(self, slot: Slot, given: tuple[Any, Any], call: tuple[Any, Any]) -> Any:
        """Reference of an offline batch; if its actor dies, the next one in that place draws it."""
        while True:
            batch, report = call
            try:
                done = ray.get(report, timeout=self.config.actors.timeout_seconds)
            except (RayTaskError, *INFRASTRUCTURE) as error:
                self._replace(slot, error)
                call = slot.handle.rollout_offline.remote(*given)
            else:
                self._accounting.count_offline(done)
                return batch

    def failed(self, call: Pending, error: Exception) -> None:
        """Replace the actor of a failed call; a place in which none can work is given up, the last one with RunFailed."""
        slot = call.slot
        if call.handle is not slot.handle or slot not in self.slots:
            return  # already replaced, or given up
        timeout = self.config.actors.timeout_seconds
        if isinstance(cause(error), ActorUnavailableError) and slot.leave_alone() < timeout:
            return  # it will answer again, or its node will be found dead
        if self.is_auto and node_died(error):
            self._retire(slot)
            return
        try:
            self._replace(slot, error)
        except RunFailed as failure:
            if len(self.slots) == 1:
                raise
            logger.error("%s; the place of rollout actor %d is given up", failure, slot.index)
            self._num_given_up += 1
            self._retire(slot)

    def _replace(self, slot: Slot, error: Exception) -> None:
        count_death(slot, error, self.config.actors.max_restarts)
        self._accounting.num_restarts += 1
        slot.handle = self._make(slot.index, slot.incarnation)

    def room(self) -> int:
        """Actors that there is room for on the nodes that are alive; at least one."""
        driver = ray.get_runtime_context().get_node_id()
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        return rollout_room(nodes, driver, self.config.actors)

    def adjust(self) -> None:
        """With auto, follow the cluster as its nodes come and go."""
        if not self.is_auto or time.monotonic() - self._looked < ADJUST_SECONDS:
            return
        self._looked = time.monotonic()
        room = max(1, self.room() - self._num_given_up)
        if room > len(self.slots):
            logger.info("room for %d rollout actors; there were %d", room, len(self.slots))
            self._grow(room)
        elif room < len(self.slots):
            logger.info("room for only %d of %d rollout actors", room, len(self.slots))
            for slot in self._least_wanted(len(self.slots) - room):
                self._retire(slot)

    def _least_wanted(self, count: int) -> list[Slot]:
        """Places of actors that are not alive first, then the newest."""
        alive = {slot.index: _is_alive(slot) for slot in self.slots}
        return sorted(self.slots, key=lambda slot: (alive[slot.index], -slot.index))[:count]

    def _retire(self, slot: Slot) -> None:
        """Take a place away; rollouts under way there never arrive, and are never counted."""
        self.slots.remove(slot)
        ray.kill(slot.handle, no_restart=True)
        self._calls.take(slots=[slot])

    def _grow(self, size: int) -> None:
        while len(self.slots) < size:
            handle = self._make(self._next_index, self._first)
            self.slots.append(Slot("rollout", self._next_index, handle, self._first))
            self._next_index += 1

    def _make(self, index: int, incarnation: int) -> Any:
        self.made.append((index, incarnation))
        resources = rollout_resources(self.config.actors)
        options = RemoteRolloutActor.options(
            num_cpus=resources.pop("CPU"),
            resources=resources,
            scheduling_strategy=over_nodes(index),
            max_concurrency=self.config.actors.max_in_flight,
        )
        return options.remote(self.config, index, incarnation)

    def close(self) -> None:
        """End the actors, and the request to an autoscaler."""
        for slot in self.slots:
            ray.kill(slot.handle, no_restart=True)
        if self.is_auto and self.config.actors.max_rollout_actors is not None:
            _request([])


def rollout_resources(actors: ActorsConfig) -> dict[str, float]:
    """What a rollout actor reserves."""
    return {"CPU": actors.num_cpus} | ({actors.rollout_resource: TRACE} if actors.rollout_resource else {})


def rollout_room(nodes: Mapping[str, Mapping[str, float]], driver: str, actors: ActorsConfig) -> int:
    """Actors that fit on nodes (id -> resources), the learner being on the driver's; at least one.

    An actor that reserves no CPU is counted as one.
    """
    room = 0
    for node, resources in nodes.items():
        if actors.rollout_resource and not resources.get(actors.rollout_resource):
            continue
        free = resources.get("CPU", 0.0) - (actors.learner_num_cpus if node == driver else 0.0)
        room += max(0, math.floor(free / (actors.num_cpus or 1.0) + 1e-6))
    return max(1, min(room, actors.max_rollout_actors or room))


def _is_alive(slot: Slot) -> bool:
    try:
        ray.get(slot.handle.ready.remote(), timeout=0.0)
    except ray.exceptions.GetTimeoutError:
        return True  # busy, or on its way
    except ray.exceptions.RayError:
        return False
    return True


def _request(bundles: Iterable[Mapping[str, float]]) -> None:
    """Ask for nodes that hold all bundles at once; without an autoscaler this has no effect."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle) for bundle in bundles])
