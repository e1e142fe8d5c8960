"""Connecting to Ray: a private instance on this machine, or a running cluster."""

import importlib
import logging
import math
import os
import socket
from pathlib import Path

import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,  # Ray calls it itself only for address auto
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from distributed.backend import RunFailed
from distributed.config import ConfigError, ExperimentConfig
from distributed.ray_token import described_token, hide_token_folder, protect_token, token_file
from distributed.run_folder import submitted_job

logger = logging.getLogger(__name__)
PROJECT_ROOT = Path(__file__).resolve().parents[1]
DRIVER_BUNDLE, LEARNER_BUNDLE = 0, 1
"""Of a trial's reservation; the rollout actors have the others."""
GCS_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""What every client of a cluster calls first."""
PACKAGES = ("learner", "actors", "distributed")


def connect(config: ExperimentConfig, num_cpus: float | None = None) -> bool:
    """Start or attach to Ray as `run.address` says; returns whether this call did it, so that the caller shuts it down.

    `num_cpus`: CPUs that must fit at a time; by default those of the run's actors.
    Raises RunFailed if there is no cluster, or it refuses, and ConfigError if it can never hold the actors asked for.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_IGNORE_UNHANDLED_ERRORS", "1"
    )  # every failed call is handled, or its cause is shown once
    needed = needed_cpus(config) if num_cpus is None else num_cpus
    if config.run.address is None:
        _start_local(needed)
    else:
        _attach(config, needed)
    return True


def needed_cpus(config: ExperimentConfig) -> float:
    """CPUs that the actors of a run reserve; with as many as there is room for, those of one."""
    count = config.actors.num_rollout_actors
    return config.actors.learner_num_cpus + (1 if count == "auto" else count) * config.actors.num_cpus


def _start_local(needed: float) -> None:
    # first on every worker's path: another installed package is called `distributed` too
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
    cpus = os.cpu_count() or 1
    if needed > cpus:
        logger.info("the actors reserve %g CPUs, this machine has %d: they will share", needed, cpus)
    hide_token_folder()
    ray.init(
        address="local",
        num_cpus=max(cpus, math.ceil(needed)),
        include_dashboard=False,
        logging_level=logging.WARNING,
    )
    protect_token()


def _attach(config: ExperimentConfig, needed: float) -> None:
    asks_for_token = False
    try:
        _check_answers(config.run.address)
        asks_for_token = _asks_for_token(config.run.address)
        if asks_for_token and not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise ConnectionError("it asks for a token")
        ray.init(address=config.run.address, logging_level=logging.WARNING, runtime_env={"py_modules": _py_modules()})
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if asks_for_token:
            raise RunFailed(
                f"run.address {config.run.address}: the Ray cluster refused {described_token()}. Copy ~/.ray/auth_token of its "
                f"head node to {token_file()} on this machine (see README, 'A cluster')"
            ) from error
        raise RunFailed(
            f"run.address {config.run.address}: no Ray cluster answered ({error}). Is it running, and is its token in "
            "~/.ray/auth_token on this machine (see README, 'A cluster')?"
        ) from error
    have = ray.cluster_resources().get("CPU", 0.0)
    if needed > have:
        ray.shutdown()
        raise ConfigError(
            f"actors.num_rollout_actors: {config.actors.num_rollout_actors} actors of {config.actors.num_cpus:g} CPUs and a "
            f"learner of {config.actors.learner_num_cpus:g} need {needed:g} CPUs; the cluster has {have:g}"
        )


def _py_modules() -> list[str]:
    """Our packages, which workers may lack, after those that a submitted job (`ray job submit`) brings itself."""
    brought = (submitted_job() or {}).get("py_modules", [])
    if brought:
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # this list instead of the job's; its other settings stay
    # folders, not modules: Ray copies what it merges with a job's settings
    return [*brought, *(str(Path(importlib.import_module(name).__file__ or "").parent) for name in PACKAGES)]


def _check_answers(address: str | None) -> None:
    """Raises OSError at once for a HOST:PORT where nothing listens; Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _asks_for_token(address: str | None) -> bool:
    """Whether a Ray cluster at HOST:PORT turns away a call without a token."""
    import grpc

    try:
        with grpc.insecure_channel(address or "") as channel:
            channel.unary_unary(GCS_METHOD)(b"", timeout=10)
    except grpc.RpcError as error:
        return error.code() == grpc.StatusCode.UNAUTHENTICATED
    return False


def beside_driver(bundle: int) -> NodeAffinitySchedulingStrategy | PlacementGroupSchedulingStrategy:
    """Placement on the driver's node, whose disk holds the run folder; in a trial, in that bundle of its reservation."""
    reserved = ray.util.get_current_placement_group()
    if reserved is not None:
        return PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=bundle)
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def over_nodes(index: int) -> str | PlacementGroupSchedulingStrategy:
    """Placement of the `index`-th rollout actor: on all nodes in turn; in a trial, in its bundle of the reservation."""
    reserved = ray.util.get_current_placement_group()
    if reserved is None:
        return "SPREAD"
    return PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=LEARNER_BUNDLE + 1 + index)


def learner_gpus(config: ExperimentConfig) -> float:
    """GPUs for the learner: those of a trial's reservation, or else of the driver's node.

    Raises ConfigError if one was asked for and that node has none.
    """
    reserved = ray.util.get_current_placement_group()
    if reserved is not None:
        return reserved.bundle_specs[LEARNER_BUNDLE].get("GPU", 0.0)
    node = ray.get_runtime_context().get_node_id()
    available = max((n["Resources"].get("GPU", 0.0) for n in ray.nodes() if n["NodeID"] == node), default=0.0)
    if config.learner.device == "cpu" or config.actors.learner_num_gpus == 0:
        return 0.0
    if available >= config.actors.learner_num_gpus:
        return config.actors.learner_num_gpus
    if config.learner.device == "cuda":
        raise ConfigError(
            f"learner.device: cuda needs {config.actors.learner_num_gpus:g} GPU on the driver's node, which has {available:g}"
        )
    return 0.0
