"""Speed of one core, in CPU seconds: sampling, training, and the share of the machine's matrix-multiplication peak."""

import time
from collections.abc import Callable

import numpy as np
import torch
import yaml

from actors.rollout import draw_trajectories
from actors.trajectories import TrajectoryBatch
from distributed.config import DEFAULT_CONFIG, ExperimentConfig, validate
from distributed.experiment import make_environment, make_learner, make_oracle, make_policy
from learner.networks.prefixes import index_prefixes
from tests.benchmarks.baseline import NaiveSGFN

BATCH = 256
NETWORK = {"hidden_size": 256, "num_layers": 3, "kmer_sizes": []}
"""3×256, as the published figures of other programs have it: no k-mer embeddings."""


def config(*, dynamics: bool) -> ExperimentConfig:
    """The default task with a 3×256 policy, and a 3×256 dynamics model or none."""
    values = yaml.safe_load(DEFAULT_CONFIG.read_text())
    values |= {
        "objective": {"name": "sgfn_db" if dynamics else "gfn_db"},
        "network": NETWORK,
        "dynamics": {"batch_size": BATCH, "network": NETWORK},
        "learner": {"batch_size": BATCH, "device": "cpu"},
    }
    return validate(values)


def cpu_rate(work: Callable[[], int], seconds: float) -> float:
    """Units of `work` a CPU second, after a warm-up."""
    work()
    done, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        done += work()
    return done / (time.process_time() - start)


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
    return rows * (3 * policy + (4 * dynamics if settings.objective.name != "gfn_db" else 0))


def sampling(seconds: float) -> dict[str, float]:
    """Trajectories sampled a CPU second, beside the baseline."""
    settings = config(dynamics=True)
    environment, rng = make_environment(settings), np.random.default_rng(0)
    policy, naive = make_policy(settings, environment), NaiveSGFN(environment, 256, 3)

    def ours() -> int:
        return len(draw_trajectories(policy, environment, environment.noise, 1024, rng))

    rate = cpu_rate(ours, seconds)
    plain = cpu_rate(lambda: len(naive.sample(1024, rng)[0]), seconds)
    return {"sampled_per_cpu_second": rate, "sampled_baseline": plain, "sampled_ratio": rate / plain}


def training(seconds: float) -> dict[str, float]:
    """Trajectories trained a CPU second with and without dynamics model, beside the baseline and the GEMM peak."""
    figures = {"gemm_gflops": gemm_gflops(seconds)}
    for name, dynamics in (("with_dynamics", True), ("without_dynamics", False)):
        settings = config(dynamics=dynamics)
        batch, replayed = trajectories(settings, BATCH), trajectories(settings, BATCH)
        learner = make_learner(settings)

        def step(learner=learner, batch=batch, replayed=replayed if dynamics else None) -> int:
            learner.update(batch, replayed)
            return BATCH

        rate = cpu_rate(step, seconds)
        share = dense_flops(settings, batch) * rate / BATCH / 1e9 / figures["gemm_gflops"]
        figures |= {f"trained_per_cpu_second_{name}": rate, f"gemm_share_{name}": share}
    naive, reward = NaiveSGFN(make_environment(settings), 256, 3), settings.reward

    def naive_step() -> int:
        naive.update(batch, reward)
        return BATCH

    figures["trained_baseline"] = cpu_rate(naive_step, seconds)
    figures["trained_ratio"] = figures["trained_per_cpu_second_with_dynamics"] / figures["trained_baseline"]
    return figures


def one_core(quick: bool) -> dict[str, float]:
    """All of the above on one thread."""
    torch.set_num_threads(1)
    seconds = 1.0 if quick else 8.0
    return sampling(seconds) | training(seconds)
