"""What a trial reserves of the cluster, and whether the cluster can ever give it."""

import itertools
import logging
import os
from collections.abc import Iterable
from contextlib import suppress

import ray

from distributed.config import ConfigError, ExperimentConfig, apply_values, validate
from distributed.ray_runtime import connect
from distributed.rollout_pool import rollout_resources
from distributed.search_space import applicable
from distributed.sweep_config import Sweep, SweepConfig

logger = logging.getLogger(__name__)
Bundle = dict[str, float]
DRIVER_CPUS = {"ray": 0.25, "serial": 1.0}
"""By default, of the process that drives a trial."""


def bundles(sweep: SweepConfig, config: ExperimentConfig, has_gpu: bool = False) -> list[Bundle]:
    """A bundle for the trial's driver (and buffer), one for its learner, one for each rollout actor.

    `has_gpu`: whether the cluster has one, which decides learner.device: auto.
    """
    driver: Bundle = {"CPU": sweep.trial_num_cpus or DRIVER_CPUS[config.run.backend]}
    actors, wants_gpu = config.actors, config.learner.device == "cuda" or (config.learner.device == "auto" and has_gpu)
    gpu: Bundle = {"GPU": actors.learner_num_gpus} if wants_gpu and actors.learner_num_gpus > 0 else {}
    if config.run.backend == "serial":
        return [driver | gpu]
    if actors.num_rollout_actors == "auto":
        raise ConfigError(
            "actors.num_rollout_actors: got 'auto'; allowed in a sweep, whose trials share the room: a number"
        )
    rollout = rollout_resources(actors) | {"CPU": max(actors.num_cpus, 0.01)}
    return [driver, {"CPU": max(actors.learner_num_cpus, 0.01)} | gpu, *(rollout,) * actors.num_rollout_actors]


def connect_with_room(sweep: Sweep) -> tuple[bool, int]:
    """Connect to Ray and see that every trial can be placed; returns whether this call started it, and the room for trials.

    Raises ConfigError if a trial of the space can never be placed.
    """
    # a process that runs trial after trial, each with threads of its own, would otherwise grow by 5 MB a trial
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    candidates = list(_candidates(sweep))
    needed = max(_total(bundles(sweep.config, config), "CPU") for config in candidates)
    own = connect(sweep.experiment, needed)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = most = sweep.config.max_concurrent or 10_000
    for asked in (bundles(sweep.config, config, cluster_has_gpu()) for config in candidates):
        room = min(room, num_fitting(asked, nodes, most))
        if room == 0:
            if own:
                ray.shutdown()
            raise ConfigError(
                f"actors: a trial reserves {_shown(asked)}; the cluster's nodes have {_shown(nodes)}, where it never fits. "
                "See actors.num_rollout_actors, actors.num_cpus, actors.learner_num_cpus, sweep.trial_num_cpus"
            )
    if sweep.config.max_concurrent is not None and room < most:
        logger.warning(
            "sweep.max_concurrent %d: a trial reserves %g CPUs, so %d run at a time here", most, needed, room
        )
    else:
        logger.info("%d trials at a time, of %g CPUs each", room, needed)
    return own, room


def cluster_has_gpu() -> bool:
    """Whether some node has a GPU."""
    return ray.cluster_resources().get("GPU", 0.0) > 0


def _candidates(sweep: Sweep) -> Iterable[ExperimentConfig]:
    """The trials, or where a search will choose them, all extremes, as far as they differ in what they reserve."""
    relevant = [key for key in sweep.config.space if key.startswith(("actors.", "learner.device", "run.backend"))]
    if sweep.config.search == "random":
        chosen = [applicable(sweep.base, sweep.config.space, point) for point in sweep.points]
        changes = [{key: point[key] for key in relevant if key in point} for point in chosen]
    else:
        extremes = (sweep.config.space[key].extremes for key in relevant)
        changes = [dict(zip(relevant, values, strict=True)) for values in itertools.product(*extremes)]
    for change in {repr(change): change for change in changes}.values():
        with suppress(ConfigError):  # which its trial will report
            yield validate(apply_values(sweep.base, change))


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
