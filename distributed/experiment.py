"""From a configuration to its parts: the same builders serve the driver, every actor and the serial backend."""

import functools
import logging
import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from actors.denoising import DenoisingWorker
from actors.design_buffer import DesignBuffer
from actors.environments.sequence import SequenceEnvironment, SequenceError
from actors.environments.time_series import PathScorer, TimeSeriesTask, path_environment
from actors.forecasting import ForecastWorker
from actors.motif_law import MotifLaw
from actors.oracles.base import Oracle, OracleDataError
from actors.oracles.jaspar import LETTERS
from actors.oracles.registry import build_oracle
from actors.oracles.table import read_sequences
from actors.replay_buffer import ReplayBuffer, trajectory_bytes
from actors.rollout import RolloutWorker
from distributed.config import ConfigError, ExperimentConfig
from learner.drakes.config import DrakesConfig
from learner.drakes.denoiser import Denoiser
from learner.drakes.learner import DrakesLearner
from learner.dynamics import DynamicsModel
from learner.forecast import ForecastConfig, ForecastLearner
from learner.gflownet import GFlowNetLearner, resolve_device
from learner.memory import count_parameters, keep_freed_memory
from learner.policy import Policy
from learner.precision import resolve_precision

logger = logging.getLogger(__name__)
GIB = 2**30
Learner = GFlowNetLearner | DrakesLearner


def derive_seed(seed: int, role: str, index: int = 0, incarnation: int = 0) -> int:
    """A seed that differs between roles, actors of a role, and restarts of an actor, and is reproducible."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(role.encode()), index, incarnation])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def actor_seeds(config: ExperimentConfig, rollouts: Iterable[tuple[int, int]]) -> dict[str, int]:
    """The seed of learner, buffer, and each rollout actor (index, incarnation), by name."""
    seed = config.run.seed
    fixed = {role: derive_seed(seed, role) for role in ("learner", "replay")}
    return fixed | {f"rollout-{index}.{count}": derive_seed(seed, "rollout", index, count) for index, count in rollouts}


def make_environment(config: ExperimentConfig) -> SequenceEnvironment:
    """The environment."""
    if config.data is not None:
        return path_environment(config.data, config.environment.noise)
    return SequenceEnvironment(config.environment)


def make_oracle(config: ExperimentConfig, environment: SequenceEnvironment) -> Oracle:
    """The oracle; raises OracleDataError or SeriesError if its data cannot be had or do not fit."""
    if isinstance(config.generator, ForecastConfig):
        return PathScorer(make_task(config), config.generator.error)
    return build_oracle(config.oracle, environment)


def make_task(config: ExperimentConfig) -> TimeSeriesTask:
    """The series that is forecast; raises SeriesError if it cannot be."""
    assert config.data is not None
    return TimeSeriesTask(config.data)


def make_policy(
    config: ExperimentConfig, environment: SequenceEnvironment, task: TimeSeriesTask | None = None
) -> Policy:
    """An untrained policy network on the CPU; with a `task`, one that reads its windows."""
    shape = None if task is None else task.shape
    return Policy(environment.space, config.network, **config.objective.policy_heads, shape=shape)


def make_denoiser(config: ExperimentConfig) -> Denoiser:
    """An untrained denoiser on the CPU."""
    assert isinstance(config.generator, DrakesConfig)
    return Denoiser(len(config.environment.alphabet), config.environment.length, config.generator.denoiser)


def make_learner(config: ExperimentConfig, *, device: str | None = None) -> Learner:
    """The learner, at step 0, on `learner.device` unless told otherwise."""
    keep_freed_memory()
    if isinstance(config.generator, DrakesConfig):
        return _make_drakes_learner(config, config.generator, device or config.learner.device)
    space = make_environment(config).space
    sections: dict[str, Any] = {
        "network": config.network,
        "objective": config.objective,
        "dynamics": config.dynamics,
        "reward": config.reward,
        "learner": config.learner.model_copy(update={"device": device or config.learner.device}),
        "total_steps": config.run.num_learner_steps,
        "seed": derive_seed(config.run.seed, "learner"),
    }
    if isinstance(config.generator, ForecastConfig):
        return ForecastLearner(space, generator=config.generator, data=make_task(config).learner_data(), **sections)
    return GFlowNetLearner(space, **sections)


def _make_drakes_learner(config: ExperimentConfig, generator: DrakesConfig, device: str) -> DrakesLearner:
    environment = make_environment(config)
    oracle = make_oracle(config, environment)
    try:
        offline = offline_sequences(config, environment, oracle)
        assert offline is not None
        tokens, lengths = offline
        if (lengths != environment.config.length).any():
            raise OracleDataError(f"replay.offline_path: allowed are sequences of length {environment.config.length}")
        scores = oracle.score(tokens, lengths) if oracle.enumerable else None
    finally:
        oracle.close()
    return DrakesLearner(
        generator,
        environment.config.length,
        len(environment.config.alphabet),
        data=tokens,
        scores=scores,
        device=resolve_device(device),
        total_steps=config.run.num_learner_steps,
        seed=derive_seed(config.run.seed, "learner"),
    )


def make_rollout_worker(config: ExperimentConfig, index: int, incarnation: int = 0) -> RolloutWorker:
    """The `index`-th rollout worker with its own oracle; `incarnation` counts its restarts and changes its seed."""
    environment = make_environment(config)
    seed = derive_seed(config.run.seed, "rollout", index, incarnation)
    oracle = make_oracle(config, environment)
    if isinstance(config.generator, DrakesConfig):
        denoiser, sampling = make_denoiser(config), config.generator.rollout
        return DenoisingWorker(environment, oracle, denoiser, config.actors, sampling, seed=seed)
    precision = resolve_precision(config.learner.precision, torch.device("cpu"))
    if isinstance(config.generator, ForecastConfig):
        assert isinstance(oracle, PathScorer)
        policy, count = make_policy(config, environment, oracle.task), config.generator.paths_per_window
        return ForecastWorker(
            environment, oracle, policy, config.actors, paths_per_window=count, seed=seed, precision=precision
        )
    policy = make_policy(config, environment)
    return RolloutWorker(environment, oracle, policy, config.actors, seed=seed, precision=precision)


def make_replay_buffer(config: ExperimentConfig) -> ReplayBuffer:
    """An empty replay buffer."""
    return replay_buffer_maker(config)()


def replay_buffer_maker(config: ExperimentConfig) -> Callable[[], ReplayBuffer]:
    """What gives an empty replay buffer, also in another process, which then needs no PyTorch."""
    space = make_environment(config).space
    seed = derive_seed(config.run.seed, "replay")
    if isinstance(config.generator, DrakesConfig):
        generator, length = config.generator, config.environment.length
        wanted = generator.bank_weight > 0 or generator.local_search_share > 0
        num_reveals = generator.rollout.num_steps + 2  # reveal steps, up to one more than the grid's
        return functools.partial(
            DesignBuffer, config.replay, length, seed=seed, num_actions=num_reveals,
            num_banked=generator.bank_batch_size if wanted else 0,
        )  # fmt: skip
    windows = {"num_contexts": len(make_task(config).origins("train"))} if config.data is not None else {}
    return functools.partial(
        ReplayBuffer, config.replay, space.max_length, seed=seed, num_actions=space.num_actions, **windows
    )


def check_memory(config: ExperimentConfig, *, training: bool) -> None:
    """Raises ConfigError for sizes that this machine cannot hold, before anything is allocated."""
    environment = make_environment(config)
    space, length = environment.space, environment.space.max_length
    task = None if config.data is None else make_task(config)
    shape = None if task is None else task.shape
    if isinstance(config.generator, DrakesConfig):
        num_parameters = count_parameters(lambda: make_denoiser(config))
    else:
        num_parameters = count_parameters(lambda: make_policy(config, environment, task))
        num_parameters += count_parameters(lambda: DynamicsModel(space, config.dynamics.network, shape))
    copies = 5 if training else 2  # weights, gradient, average and two moments
    need_memory("network.hidden_size and the like", f"{num_parameters:,} parameters", 4 * copies * num_parameters)
    row = trajectory_bytes(length)
    need_memory("evaluation.num_samples", f"samples of length {length}", config.evaluation.num_samples * row)
    if training:
        need_memory("replay.capacity", f"trajectories of length {length}", config.replay.capacity * row)
        need_memory("actors.batch_size", f"trajectories of length {length}", config.actors.batch_size * row)
        policies = 4 * length * space.num_actions
        need_memory("learner.batch_size", "the policy's outputs", config.learner.batch_size * policies)
        need_memory(
            "dynamics.batch_size", "the model's outputs", config.dynamics.batch_size * policies * space.num_actions
        )


def need_memory(key: str, what: str, num_bytes: int) -> None:
    """Raises ConfigError naming `key` if this machine has less memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory:
        raise ConfigError(f"{key}: {what} need {num_bytes / GIB:,.1f} GiB; this machine has {memory / GIB:,.1f} GiB")


def need_enumeration(environment: SequenceEnvironment) -> None:
    """Raises ConfigError if this machine cannot hold all sequences and a few numbers for each."""
    size = environment.space.num_sequences
    need_memory("evaluation.max_sequences", f"{size:,} sequences", size * (2 * environment.space.max_length + 50))


def num_dynamics_trajectories(config: ExperimentConfig, num_fresh: int) -> int:
    """Replayed trajectories that the dynamics model needs for a learner call with `num_fresh` fresh ones."""
    on_policy = config.dynamics.mode == "on_policy" or not config.objective.uses_dynamics
    if on_policy or config.generator.name == "drakes":
        return 0
    total = num_fresh / (1 - config.replay.replay_share - config.replay.offline_share)
    steps = max(1, round(total / config.learner.batch_size))
    return steps * config.dynamics.num_rounds * config.dynamics.batch_size


def make_motif_law(config: ExperimentConfig) -> MotifLaw | None:
    """The law of the offline data if it is known, or None; raises OracleDataError for motifs or letters that do not fit."""
    if config.replay.offline_source != "motif_law":
        return None
    if config.environment.alphabet != LETTERS:
        raise OracleDataError(
            f"replay.offline_source motif_law draws DNA: environment.alphabet must be {LETTERS}, got "
            f"{config.environment.alphabet!r}"
        )
    return MotifLaw(config.replay.motif_law, config.environment.length)


def offline_sequences(
    config: ExperimentConfig, environment: SequenceEnvironment, oracle: Oracle
) -> tuple[np.ndarray, np.ndarray] | None:
    """`tokens` [n, T] and `lengths` [n] of the offline data, or None; raises OracleDataError if they cannot be had."""
    replay = config.replay
    if replay.offline_source == "none":
        return None
    if replay.offline_source == "file":
        assert replay.offline_path is not None
        try:
            tokens, lengths = environment.tokens(read_sequences(replay.offline_path), origin=str(replay.offline_path))
        except SequenceError as error:
            raise OracleDataError(str(error)) from error
    elif replay.offline_source == "motif_law":
        law = make_motif_law(config)
        assert law is not None
        rng = np.random.default_rng(derive_seed(config.run.seed, "offline"))
        tokens = law.sample(replay.offline_size, rng)
        lengths = np.full(len(tokens), law.length)
    else:
        if not oracle.enumerable or environment.space.num_sequences > config.evaluation.max_sequences:
            raise OracleDataError(
                "replay.offline_source lower_half needs an oracle that is a table of an enumerable space"
            )
        need_enumeration(environment)
        tokens, lengths = environment.space.enumerate()
        scores = oracle.score(tokens, lengths)
        lower = np.isfinite(scores) & (scores <= np.nanmedian(scores))
        tokens, lengths = tokens[lower], lengths[lower]
    if len(tokens) > replay.offline_size:
        rng = np.random.default_rng(derive_seed(config.run.seed, "offline"))
        chosen = rng.choice(len(tokens), replay.offline_size, replace=False)
        tokens, lengths = tokens[chosen], lengths[chosen]
    return tokens, lengths
