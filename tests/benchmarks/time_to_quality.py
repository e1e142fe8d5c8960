"""CPU seconds of one core until the exact law is near the target, beside a straightforward implementation."""

import time

import numpy as np
import torch
import yaml

from actors.trajectories import empty_batch
from distributed.config import DEFAULT_CONFIG, validate
from distributed.evaluation import Evaluator
from distributed.local_backend import SerialBackend
from learner import exact
from tests.benchmarks.baseline import NaiveSGFN, mlp

CPU_SECONDS = 100.0
"""Training, evaluations not counted; the learning rate decays towards their end."""
EVERY = 2.5
GOALS = {"exact_tv": (0.15, 0.1), "excess_kl": (0.1, 0.05)}
BASELINE_SHARE = 0.4
"""Of the seconds, those that the baseline is given: what it reaches then is compared with what ours has by then."""


def time_to_quality(quick: bool) -> dict[str, float]:
    """First CPU second at which each goal is met by the default experiment (NaN: never), and where the baseline is then."""
    torch.set_num_threads(1)
    seconds = 3.0 if quick else CPU_SECONDS
    values = yaml.safe_load(DEFAULT_CONFIG.read_text())
    config = validate(values | {"run": {"backend": "serial"}})
    backend = SerialBackend(config)
    evaluator = Evaluator(config, backend.worker.environment, backend.worker.oracle)
    curve = []
    used = 0.0
    while used < seconds:
        start = time.process_time()
        while time.process_time() - start < min(EVERY, seconds / 4):
            passed = used + time.process_time() - start
            step = backend.learner.step
            backend.learner.total_steps = int(step * seconds / passed) + 1 if passed > 0.02 * seconds else 10**9
            backend.step()
        used += time.process_time() - start
        curve.append({"seconds": used} | evaluator.exact_metrics(backend.evaluation_weights())[0])
    figures = {f"{name}_at_end": curve[-1][name] for name in GOALS}
    for name, levels in GOALS.items():
        for level in levels:
            figures[f"seconds_to_{name}_{level}"] = next((c["seconds"] for c in curve if c[name] <= level), np.nan)
    given = BASELINE_SHARE * seconds
    ours = next(c for c in curve if c["seconds"] >= given)
    baseline = evaluator.distances(_baseline(backend, given))
    for name in GOALS:
        figures |= {f"{name}_then": ours[name], f"{name}_baseline": baseline[name]}
    return figures | {"seconds_then": given, "num_trajectories": backend.accounting.num_sampled}


def _baseline(backend: SerialBackend, seconds: float) -> np.ndarray:
    """The law float64 [n] of the baseline with 3×256 units, after `seconds` of training on batches of 256."""
    environment, oracle, rng = backend.worker.environment, backend.worker.oracle, np.random.default_rng(0)
    torch.manual_seed(0)
    naive = NaiveSGFN(environment, lambda inputs, outputs: mlp(inputs, outputs, 256, 3), dynamics=True)
    batch = empty_batch(naive.steps, 256)
    batch.num_steps[:] = naive.steps
    start = time.process_time()
    while time.process_time() - start < seconds:
        batch.tokens[:], batch.actions[:] = naive.sample(256, rng)
        batch.scores[:] = oracle.score(batch.tokens, batch.num_steps)
        naive.update(batch, backend.config.reward)
    tables = []
    with torch.no_grad():
        for depth in range(naive.steps):
            prefixes = torch.cartesian_prod(*[torch.arange(naive.actions)] * max(1, depth)).view(-1, max(1, depth))
            states = torch.zeros(naive.actions**depth, naive.steps, naive.actions)
            states[:, :depth] = torch.nn.functional.one_hot(prefixes, naive.actions).float()[: len(states), :depth]
            logits = naive.policy(states.flatten(1))[:, : naive.actions]
            tables.append(logits.double().softmax(-1).numpy())
    return exact.realised_law(environment.space, tables, environment.kernel)[0]
