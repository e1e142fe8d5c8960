"""Speed of one core, in CPU seconds: sampling, training, and the share of the machine's matrix-multiplication peak."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from actors.rollout import draw_trajectories
from actors.trajectories import TrajectoryBatch
from distributed.config import DEFAULT_CONFIG, ExperimentConfig, validate
from distributed.experiment import make_environment, make_learner, make_oracle, make_policy
from learner.networks.prefixes import index_prefixes
from learner.networks.transformer import TransformerConfig
from learner.precision import autocast, resolve_precision
from tests.benchmarks.baseline import NaiveSGFN, Transformer, mlp

BATCH = 256
SAMPLED = 1024
TURNS = 6
NETWORK = {"hidden_size": 256, "num_layers": 3, "kmer_sizes": []}
"""3×256, as the published figures of other programs have it: no k-mer embeddings."""


TRANSFORMER = {"name": "transformer", "hidden_size": 64, "num_layers": 2, "num_heads": 4}


def config(
    *,
    dynamics: bool,
    network: dict[str, Any] = NETWORK,
    batch_size: int = BATCH,
    noise: float = 0.25,
    length: int = 8,
    objective: str | None = None,
    precision: str = "float32",
) -> ExperimentConfig:
    """The default task with a policy and a dynamics model (or none) of one shape, for strings of any length."""
    values = yaml.safe_load(DEFAULT_CONFIG.read_text())
    if length != 8:
        values["oracle"] = {"name": "motifs", "motifs": ["HNF1A"]}
    values["environment"] |= {"noise": noise, "length": length}
    objective = objective or ("sgfn_db" if dynamics else "gfn_db")
    values |= {
        "objective": {"name": objective, "dynamics": "learned" if dynamics else "none"},
        "network": network,
        "dynamics": {"batch_size": batch_size, "network": network},
        "learner": {"batch_size": batch_size, "device": "cpu", "precision": precision},
    }
    return validate(values)


def cpu_rates(works: Sequence[Callable[[], int]], seconds: float) -> list[float]:
    """Units of each work a CPU second, of `seconds` each, after a warm-up.

    The works take turns, and the best of `TURNS` counts: what was slower is what else went on in the machine.
    """
    for work in works:
        work()
    best = [0.0] * len(works)
    for _ in range(TURNS):
        for number, work in enumerate(works):
            done, start, spent = 0, time.process_time(), 0.0
            while spent < seconds / TURNS:
                done += work()
                spent = time.process_time() - start
            best[number] = max(best[number], done / spent)
    return best


def cpu_rate(work: Callable[[], int], seconds: float) -> float:
    """Units of one work a CPU second."""
    return cpu_rates([work], seconds)[0]


def beside(name: str, ours: Callable[[], int], plain: Callable[[], int], seconds: float) -> dict[str, float]:
    """The rate of `ours`, that of the baseline, and their ratio."""
    rate, baseline = cpu_rates([ours, plain], seconds)
    return {f"{name}_per_cpu_second": rate, f"{name}_baseline": baseline, f"{name}_ratio": rate / baseline}


def gemm_gflops(seconds: float) -> float:
    """Best float32 rate of one core, in GFLOP/s, over the shapes that the learner uses and larger ones."""
    best = 0.0
    for rows, inner, columns in ((1024, 256, 256), (2304, 256, 256), (2048, 2048, 2048)):
        a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)

        def multiply(a=a, b=b, out=out) -> int:
            torch.mm(a, b, out=out)
            return 2 * a.shape[0] * a.shape[1] * b.shape[1]

        best = max(best, cpu_rate(multiply, seconds / 3))
    return best / 1e9


def trajectories(settings: ExperimentConfig, count: int) -> TrajectoryBatch:
    """Scored trajectories of an untrained policy."""
    environment = make_environment(settings)
    batch = draw_trajectories(
        make_policy(settings, environment), environment, environment.noise, count, np.random.default_rng(0)
    )
    batch.scores[:] = make_oracle(settings, environment).score(batch.tokens, batch.num_steps)
    return batch


def dense_flops(settings: ExperimentConfig, batch: TrajectoryBatch) -> float:
    """Useful dense-layer operations of one learner step: forward 1, backward 2 (policy 3, dynamics 3 + 1)."""
    rows = len(index_prefixes(batch.tokens, batch.num_steps, 4, finished=False).rows)
    hidden, dense = settings.network.hidden_size, settings.network.num_layers - 1
    policy, dynamics = (2 * hidden * (dense * hidden + outputs) for outputs in (5, 16))
    return rows * (3 * policy + (4 * dynamics if settings.objective.uses_dynamics else 0))


def naive(settings: ExperimentConfig) -> NaiveSGFN:
    """The baseline with networks of the same shape."""
    network, environment = settings.network, make_environment(settings)

    def trunk(inputs: int, outputs: int) -> nn.Module:
        if isinstance(network, TransformerConfig):
            steps = settings.environment.length
            return Transformer(steps, inputs, outputs, network.hidden_size, network.num_layers)
        return mlp(inputs, outputs, network.hidden_size, network.num_layers)

    return NaiveSGFN(environment, trunk, dynamics=settings.objective.uses_dynamics)


def sampling(settings: ExperimentConfig, seconds: float) -> dict[str, float]:
    """Trajectories sampled a CPU second, beside the baseline; 1,024 a call, or the batch if that is larger."""
    environment, rng = make_environment(settings), np.random.default_rng(0)
    policy, plain = make_policy(settings, environment), naive(settings)
    count = max(SAMPLED, settings.learner.batch_size)
    cpu = torch.device("cpu")
    precision = resolve_precision(settings.learner.precision, cpu)

    def ours() -> int:
        with autocast(precision, cpu):
            return len(draw_trajectories(policy, environment, environment.noise, count, rng))

    return beside("sampled", ours, lambda: len(plain.sample(count, rng)[0]), seconds)


def training(settings: ExperimentConfig, seconds: float) -> dict[str, float]:
    """Trajectories trained a CPU second, beside the baseline; dynamics and policy have a batch each."""
    size = settings.learner.batch_size
    batch, replayed = trajectories(settings, size), trajectories(settings, size)
    learner, plain = make_learner(settings), naive(settings)

    def step() -> int:
        learner.update(batch, replayed if settings.objective.uses_dynamics else None)
        return size

    def plain_step() -> int:
        plain.update(batch, settings.reward)
        return size

    return beside("trained", step, plain_step, seconds)


def one_core(quick: bool) -> dict[str, float]:
    """3×256, batch 256, on one thread: rates, and the share of the matrix-multiplication peak."""
    torch.set_num_threads(1)
    seconds = 0.2 if quick else 8.0
    peak = gemm_gflops(seconds)
    figures = {"gemm_gflops": peak}
    for precision in ("float32", "bfloat16"):
        found = sampling(config(dynamics=True, precision=precision), seconds)
        figures |= {f"{key}_{precision}": value for key, value in found.items()}
    for dynamics, precision in itertools.product((True, False), ("float32", "bfloat16")):
        settings = config(dynamics=dynamics, precision=precision)
        name = f"{'with' if dynamics else 'without'}_dynamics_{precision}"
        found = training(settings, seconds)
        useful = dense_flops(settings, trajectories(settings, BATCH)) / BATCH
        found["gemm_share"] = useful * found["trained_per_cpu_second"] / 1e9 / peak
        figures |= {f"{key}_{name}": value for key, value in found.items()}
    return figures


SHAPES: dict[str, dict[str, Any]] = {
    "3x256": {},
    "2x256": {"network": NETWORK | {"num_layers": 2}},
    "3x2048_batch_32": {"network": NETWORK | {"hidden_size": 2048}, "batch_size": 32},
    "3x2048_batch_32_bfloat16": {
        "network": NETWORK | {"hidden_size": 2048},
        "batch_size": 32,
        "precision": "bfloat16",
    },
    "3x2048_batch_32_without_dynamics_bfloat16": {
        "network": NETWORK | {"hidden_size": 2048},
        "batch_size": 32,
        "dynamics": False,
        "precision": "bfloat16",
    },
    "batch_16": {"batch_size": 16},
    "batch_2048": {"batch_size": 2048},
    "noiseless_without_dynamics": {"noise": 0, "dynamics": False},
    "2x256_tb_without_dynamics": {
        "noise": 0,
        "dynamics": False,
        "network": NETWORK | {"num_layers": 2},
        "objective": "tb",
    },
    "default_network": {"network": {}},
    "transformer": {"network": TRANSFORMER},
    "length_64": {"length": 64},
    "transformer_length_64": {"network": TRANSFORMER, "length": 64, "batch_size": 64},
}
"""What differs from 3×256, batch 256, noise .25, with dynamics model, T = 8; the others are those of the published figures."""


def shapes(quick: bool) -> dict[str, float]:
    """Rates on one thread by network, batch, noise, model of the dynamics and length, each beside the baseline's."""
    torch.set_num_threads(1)
    seconds = 0.3 if quick else 3.0
    figures = {}
    for name, changes in SHAPES.items():
        settings = config(**{"dynamics": True} | changes)
        found = sampling(settings, seconds) | training(settings, seconds)
        figures |= {f"{name}.{key}": value for key, value in found.items() if not key.endswith("baseline")}
    return figures
