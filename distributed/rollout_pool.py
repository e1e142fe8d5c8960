"""The rollout actors of a run: a fixed number, or as many as the cluster has room for, coming and going with its nodes."""

import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray

from actors.rollout import ActorsConfig
from distributed.config import ExperimentConfig
from distributed.ray_actors import RemoteRolloutActor
from distributed.ray_calls import Slot
from distributed.ray_runtime import over_nodes

logger = logging.getLogger(__name__)
ADJUST_SECONDS = 2.0
"""How often the cluster's nodes are looked at, with actors.num_rollout_actors: auto."""
TRACE = 0.001
"""Share of `actors.rollout_resource` that an actor takes: it only says where the actor may run."""


class RolloutPool:
    """Places for rollout actors, and the actors in them."""

    def __init__(self, config: ExperimentConfig, first_incarnation: int):
        self.config, self.slots = config, list[Slot]()
        self._first, self._next_index, self._looked = first_incarnation, 0, 0.0
        self.is_auto = config.actors.num_rollout_actors == "auto"

    def start(self) -> None:
        """Make the actors; asks an autoscaling cluster for room for the most that there may be."""
        actors = self.config.actors
        if self.is_auto and actors.max_rollout_actors is not None:
            _request([rollout_resources(actors)] * actors.max_rollout_actors)
        self._grow(self.room() if actors.num_rollout_actors == "auto" else actors.num_rollout_actors)

    def room(self) -> int:
        """Actors that there is room for on the nodes that are alive; at least one."""
        driver = ray.get_runtime_context().get_node_id()
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        return rollout_room(nodes, driver, self.config.actors)

    def adjust(self) -> list[Slot]:
        """With auto, follow the cluster as its nodes come and go; returns the places that were given up."""
        if not self.is_auto or time.monotonic() - self._looked < ADJUST_SECONDS:
            return []
        self._looked = time.monotonic()
        room = self.room()
        if room > len(self.slots):
            logger.info("room for %d rollout actors; there were %d", room, len(self.slots))
            self._grow(room)
        elif room < len(self.slots):
            logger.info("room for only %d of %d rollout actors", room, len(self.slots))
            return [self.retire(slot) for slot in self._least_wanted(len(self.slots) - room)]
        return []

    def refill(self, slot: Slot) -> None:
        """Put a new actor in a place whose actor died."""
        slot.handle = self._make(slot.index, slot.incarnation)

    def _least_wanted(self, count: int) -> list[Slot]:
        """Places of actors that are not alive first, then the newest."""
        alive = {slot.index: _is_alive(slot) for slot in self.slots}
        return sorted(self.slots, key=lambda slot: (alive[slot.index], -slot.index))[:count]

    def retire(self, slot: Slot) -> Slot:
        """Give a place up."""
        self.slots.remove(slot)
        ray.kill(slot.handle, no_restart=True)
        return slot

    def _grow(self, size: int) -> None:
        while len(self.slots) < size:
            handle = self._make(self._next_index, self._first)
            self.slots.append(Slot("rollout", self._next_index, handle, self._first))
            self._next_index += 1

    def _make(self, index: int, incarnation: int) -> Any:
        resources = rollout_resources(self.config.actors)
        options = RemoteRolloutActor.options(
            num_cpus=resources.pop("CPU"), resources=resources, scheduling_strategy=over_nodes(index)
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
