"""What a trial reserves of the cluster, and whether the cluster can ever give it."""

import logging
import os
from collections.abc import Iterable
from typing import Any

import ray

from distributed.config import ConfigError, ExperimentConfig, apply_values, validate
from distributed.ray_runtime import connect
from distributed.sweep_config import SweepConfig

logger = logging.getLogger(__name__)
Bundle = dict[str, float]
DRIVER_CPUS = {"ray": 0.25, "serial": 1.0}
"""By default, of the process that drives a trial."""


def bundles(sweep: SweepConfig, config: ExperimentConfig) -> list[Bundle]:
    """A bundle for the trial's driver (and buffer), one for its learner, one for each rollout actor."""
    driver = sweep.trial_num_cpus or DRIVER_CPUS[config.run.backend]
    if config.run.backend == "serial":
        return [{"CPU": driver}]
    actors = config.actors
    learner = {"CPU": max(actors.learner_num_cpus, 0.01)}
    if config.learner.device == "cuda" and actors.learner_num_gpus > 0:
        learner["GPU"] = actors.learner_num_gpus
    return [{"CPU": driver}, learner, *({"CPU": max(actors.num_cpus, 0.01)},) * actors.num_rollout_actors]


def connect_with_room(sweep: SweepConfig, base: dict[str, Any]) -> bool:
    """Connect to Ray and see that every trial can be placed; returns whether this call started it.

    Raises ConfigError if a trial of the space can never be placed.
    """
    largest = max(_candidates(sweep, base), key=lambda config: _total(bundles(sweep, config), "CPU"))
    # a process that runs trial after trial, each with threads of its own, would otherwise grow by 5 MB a trial
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    asked = bundles(sweep, largest)
    needed = _total(asked, "CPU")
    own = connect(largest, needed)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not fits(asked, nodes):
        if own:
            ray.shutdown()
        raise ConfigError(
            f"actors: a trial reserves {_shown(asked)}; the cluster's nodes have {_shown(nodes)}, where it never fits. See "
            "actors.num_rollout_actors, actors.num_cpus, actors.learner_num_cpus, sweep.trial_num_cpus"
        )
    room = num_fitting(asked, nodes)
    if sweep.max_concurrent is not None and sweep.max_concurrent > room:
        logger.warning(
            "sweep.max_concurrent %d: a trial reserves %g CPUs, so %d run at a time here",
            sweep.max_concurrent,
            needed,
            room,
        )
    else:
        logger.info("%d trials at a time, of %g CPUs each", min(room, sweep.max_concurrent or room), needed)
    return own


def _candidates(sweep: SweepConfig, base: dict[str, Any]) -> Iterable[ExperimentConfig]:
    """The base experiment, and those that differ from it in one value that changes what is reserved."""
    yield validate(base)
    for key, domain in sweep.space.items():
        if key.startswith(("actors.", "learner.device")):
            yield from (validate(apply_values(base, {key: value})) for value in domain.extremes)


def fits(asked: list[Bundle], nodes: list[Bundle]) -> bool:
    """Whether all bundles can be placed on the nodes at once."""
    return num_fitting(asked, nodes, most=1) == 1


def num_fitting(asked: list[Bundle], nodes: list[Bundle], most: int = 10_000) -> int:
    """How many times `asked` can be placed on the nodes, largest bundle first, each on the first node with room."""
    free = [dict(node) for node in nodes]
    for count in range(most):
        for bundle in sorted(asked, key=lambda b: (b.get("GPU", 0.0), b["CPU"]), reverse=True):
            node = next((n for n in free if all(n.get(k, 0.0) >= v - 1e-9 for k, v in bundle.items())), None)
            if node is None:
                return count
            for name, amount in bundle.items():
                node[name] -= amount
    return most


def _total(resources: Iterable[Bundle], name: str) -> float:
    return sum(bundle.get(name, 0.0) for bundle in resources)


def _shown(resources: list[Bundle]) -> str:
    cpus, gpus = _total(resources, "CPU"), _total(resources, "GPU")
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "") + f" in {len(resources)} part(s)"
