"""Objectives and search baselines at equal CPU time: one cell of a comparison, and the table and plot of all.

A cell is a variant (changes of the base experiment, or a baseline's name) x a noise level x a seed. It is computed by
one process on one core: CPU seconds are then what training costs, and the learning rate decays towards their end.
"""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from actors.baselines import GeneticSearch, MetropolisHastings, SearchBaseline, UniformSearch
from actors.rollout import draw_trajectories
from distributed.config import ConfigError, ExperimentConfig, validate
from distributed.evaluation import Evaluator
from distributed.experiment import derive_seed, make_environment, make_oracle
from distributed.local_backend import SerialBackend
from learner.configs import StrictConfig
from learner.exact_baselines import law_through_noise, metropolis_law
from learner.gflownet import GFlowNetLearner
from learner.rewards import valid_log_rewards

BASELINES: dict[str, Callable[..., SearchBaseline]] = {
    "uniform": UniformSearch,
    "metropolis_hastings": MetropolisHastings,
    "genetic": GeneticSearch,
}
COLUMNS = (
    "exact_tv", "excess_kl", "mean_score", "top100_mean", "num_modes", "num_trajectories", "cpu_seconds",
)  # fmt: skip
KEYS = ("variant", "noise", "seed")


class ComparisonConfig(StrictConfig):
    """What is compared; the other sections of the file are the base experiment."""

    variants: dict[str, dict[str, dict[str, Any]]] = Field(min_length=1)
    """Name of each variant: the sections and keys by which it differs from the base experiment."""
    baselines: tuple[Literal["uniform", "metropolis_hastings", "genetic"], ...] = ()
    """Searches set beside them; their oracle queries are of designs, and noise acts when the last designs are made."""
    noise: tuple[float, ...] = Field((0.0, 0.1, 0.25, 0.5), min_length=1)
    """Values of environment.noise."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Values of run.seed."""
    cpu_seconds: float = Field(30.0, gt=0)
    """Training time of each cell, in seconds of one core."""
    num_processes: int | None = Field(None, ge=1)
    """Cells computed at a time, each by one thread; null: one for each CPU."""


class Cell(NamedTuple):
    """One computation of a comparison."""

    variant: str
    noise: float
    seed: int
    baseline: bool
    config: ExperimentConfig


def make_cells(base: dict[str, Any], comparison: ComparisonConfig) -> list[Cell]:
    """All cells, seeds outermost, so that an interrupted comparison is balanced; raises ConfigError for any that is wrong."""
    clash = sorted(set(comparison.variants) & set(comparison.baselines))
    if clash:
        raise ConfigError(f"comparison.variants: {clash[0]!r} is the name of a baseline")
    rows: list[tuple[str, dict[str, Any], bool]] = [(name, {}, True) for name in comparison.baselines]
    rows += [(name, changes, False) for name, changes in comparison.variants.items()]
    cells = []
    for seed in comparison.seeds:
        for noise in comparison.noise:
            for name, changes, baseline in rows:
                values = {section: dict(keys) for section, keys in base.items()}
                fixed = {"run": {"seed": seed, "backend": "serial"}, "environment": {"noise": noise}}
                for section, keys in (*changes.items(), *fixed.items()):
                    values[section] = values.get(section, {}) | keys
                try:
                    config = validate(values)
                except ConfigError as error:
                    raise ConfigError(f"comparison.variants.{name}: {error}") from error
                cells.append(Cell(name, noise, seed, baseline, config))
    return cells


def compute(cell: Cell, cpu_seconds: float) -> dict[str, Any]:
    """The figures of a cell, on one thread of this process."""
    torch.set_num_threads(1)
    start = time.process_time()
    figures = _search(cell, cpu_seconds) if cell.baseline else _train(cell.config, cpu_seconds)
    keys = dict(zip(KEYS, cell[:3], strict=True))
    return keys | figures | {"cpu_seconds_with_evaluation": time.process_time() - start}


def _train(config: ExperimentConfig, cpu_seconds: float) -> dict[str, float]:
    """Train for `cpu_seconds`; the schedule's end is moved to where the time runs out."""
    backend = SerialBackend(config)
    backend.start(None)
    if not isinstance(backend.learner, GFlowNetLearner):
        raise ConfigError("generator.name: objectives are compared for gflownet only")
    try:
        start, used = time.process_time(), 0.0
        while used < cpu_seconds:
            if used > 0.02 * cpu_seconds:
                backend.learner.total_steps = int(backend.learner.step * cpu_seconds / used) + 1
            else:
                backend.learner.total_steps = 1_000_000_000
            backend.step()
            used = time.process_time() - start
        counts = {"num_trajectories": backend.accounting.num_sampled, "num_learner_steps": backend.learner.step}
        evaluator = Evaluator(config, backend.worker.environment, backend.worker.oracle)
        weights = backend.evaluation_weights()
        metrics = evaluator.exact_metrics(weights)[0] if evaluator.is_exact else {}
        return metrics | evaluator.sample_metrics(weights)[0] | counts | {"cpu_seconds": used}
    finally:
        backend.close()


def _search(cell: Cell, cpu_seconds: float) -> dict[str, float]:
    """Run a baseline for `cpu_seconds` of steps; its last designs are made under noise, and judged as samples are."""
    config, environment = cell.config, make_environment(cell.config)
    oracle = make_oracle(config, environment)
    evaluator = Evaluator(config, environment, oracle)
    rng = np.random.default_rng(derive_seed(config.run.seed, "baseline"))
    search = BASELINES[cell.variant](environment, oracle, config.reward, config.evaluation.num_samples, rng)
    start, num_steps, used = time.process_time(), 0, 0.0
    while used < cpu_seconds:
        search.step()
        num_steps, used = num_steps + 1, time.process_time() - start
    made = draw_trajectories(
        evaluator.policy, environment, environment.noise, len(search.designs), rng, intended=search.designs
    )
    made.scores[:] = oracle.score(made.tokens, made.num_steps)
    metrics = evaluator.metrics_of(made)
    if evaluator.is_exact and cell.variant != "genetic":
        space = environment.space
        steps = num_steps if cell.variant == "metropolis_hastings" else 0
        log_rewards = valid_log_rewards(evaluator.scores, config.reward)
        law = metropolis_law(space, log_rewards, steps)
        metrics |= evaluator.distances(law_through_noise(space, law, environment.kernel))
    oracle.close()
    return metrics | {"num_trajectories": search.num_oracle_calls, "cpu_seconds": used}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished cells in a results.jsonl; a line cut short is passed over."""
    results: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return results


class Summary(NamedTuple):
    """One row of the table: a variant at one noise level, over its seeds."""

    variant: str
    noise: float
    num_seeds: int
    figures: dict[str, tuple[float, float, float]]
    """Column -> median, smallest, largest."""


def summarise(results: Iterable[dict[str, Any]]) -> list[Summary]:
    """A row for each variant and noise level, in order of noise and then of exact TV (or falling mean score)."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["variant"], result["noise"]), []).append(result)
    rows = []
    for (variant, noise), members in groups.items():
        figures = {}
        for name in COLUMNS:
            values = [member[name] for member in members if member.get(name) is not None]
            if values:
                figures[name] = (float(np.median(values)), float(min(values)), float(max(values)))
        rows.append(Summary(variant, noise, len(members), figures))
    return sorted(rows, key=lambda row: (row.noise, *_rank(row)))


def _rank(row: Summary) -> tuple[bool, float]:
    """Order within a noise level: by exact TV, then those without one, by falling mean score."""
    if "exact_tv" in row.figures:
        return False, row.figures["exact_tv"][0]
    return True, -row.figures.get("mean_score", (0.0,))[0]
