"""Distances of a sampler to its target from samples whose probability is known, for spaces too large to enumerate.

The log-weight of a sample, log R(x) - log p_θ(x), gives unbiased Z (its mean weight) and, self-normalised, consistent
estimates of everything else; no histogram is involved. Intervals are percentile bootstraps (Efron 1979). Where the policy
reads its own earlier intentions, p_θ is that of the sequence given them, and the distances are those of the joint laws:
upper bounds. Shapes: n samples, T steps, A actions.
"""

from collections.abc import Callable

import numpy as np
import torch

from learner.batch import TensorBatch, Trajectories
from learner.policy import Policy

CHUNK = 256
NUM_RESAMPLES = 400
CONFIDENCE = 0.95


@torch.no_grad()
def log_probabilities(policy: Policy, trajectories: Trajectories, kernel: np.ndarray) -> np.ndarray:
    """log p_θ(x) = Σ_t log Σ_a π(a|s_t) K_t(x_t|a) of each trajectory, float64 [n]; `kernel` [T, A, A] is the true one."""
    log_kernel, parts = torch.from_numpy(np.log(np.maximum(kernel, 1e-300))), []
    for start in range(0, len(trajectories), CHUNK):
        batch = TensorBatch(
            trajectories[start : start + CHUNK], policy.space.num_actions, torch.device("cpu"),
            finished=False, thought_context=policy.thought_context,
        )  # fmt: skip
        log_policy = policy(batch.symbols(policy.thought_context), batch.rows).log_policy.double()
        outcomes = log_kernel.transpose(1, 2)[torch.arange(len(kernel)), batch.tokens]
        log_outcome = (batch.of_prefixes(log_policy)[:, :-1] + outcomes).logsumexp(-1)
        parts.append(torch.where(batch.mask, log_outcome, 0.0).sum(1).numpy())
    return np.concatenate(parts)


def importance_metrics(
    log_probabilities: np.ndarray, log_rewards: np.ndarray, scores: np.ndarray, rng: np.random.Generator
) -> dict[str, float]:
    """Estimates of the distances to p* ∝ R from n samples of p_θ, each with the ends of a 95% interval (`_low`, `_high`).

    `effective_sample_fraction` = (Σw)²/(nΣw²): where it is small, the target lies where no sample did, and the estimates
    are too favourable. All three arrays are float [n]; a log-reward of minus infinity stands for a sample that the target
    excludes (the reverse KL is then infinite).
    """
    log_weights = np.asarray(log_rewards, dtype=np.float64) - log_probabilities
    weights = np.exp(log_weights - log_weights.max())
    metrics = {"effective_sample_fraction": float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))}
    return metrics | bootstrap(lambda rows: _estimates(log_weights[rows], scores[rows]), len(log_weights), rng)


def bootstrap(
    estimates: Callable[[np.ndarray], dict[str, float]], count: int, rng: np.random.Generator
) -> dict[str, float]:
    """`estimates` from `count` samples by their row numbers int64 [count], each with `_low` and `_high` of its interval.

    Percentile intervals of 95%, from 400 draws of the samples with replacement (Efron 1979).
    """
    tail, resampled = (1 - CONFIDENCE) / 2, dict[str, list[float]]()
    for _ in range(NUM_RESAMPLES):
        for name, value in estimates(rng.integers(count, size=count)).items():
            resampled.setdefault(name, []).append(value)
    metrics: dict[str, float] = {}
    for name, value in estimates(np.arange(count)).items():
        low, high = np.quantile(resampled[name], [tail, 1 - tail], method="inverted_cdf")
        metrics |= {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
    return metrics


def _estimates(log_weights: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    top = log_weights.max()
    weights = np.exp(log_weights - top)
    mean = weights.mean()
    log_z = float(np.log(mean) + top)
    return {
        "sampled_tv": float(0.5 * np.abs(weights / mean - 1).mean()),
        "sampled_reverse_kl": log_z - float(log_weights.mean()),
        "log_z_estimate": log_z,
        "target_mean_score_estimate": float((weights * scores).sum() / weights.sum()),
    }


def normalised_weights(log_probabilities: np.ndarray, log_rewards: np.ndarray) -> np.ndarray:
    """Self-normalised importance weights float64 [n], summing to one: under them samples count as the target's."""
    log_weights = np.asarray(log_rewards, dtype=np.float64) - log_probabilities
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def kmer_frequencies(
    tokens: np.ndarray, lengths: np.ndarray, weights: np.ndarray, num_tokens: int, k: int
) -> np.ndarray:
    """Expected share of each k-mer among all of a sequence, float64 [V^k]; `weights` float [n] sum to one.

    `tokens` int [n, T] and `lengths` int [n]; sequences shorter than k count for nothing.
    """
    count, steps = tokens.shape
    if steps < k:
        return np.zeros(num_tokens**k)
    codes = np.zeros((count, steps - k + 1), dtype=np.int64)
    for offset in range(k):
        codes = codes * num_tokens + tokens[:, offset : steps - k + 1 + offset]
    inside = np.arange(steps - k + 1) + k <= lengths[:, None]
    shares = np.where(inside, (weights / np.maximum(inside.sum(1), 1))[:, None], 0.0)
    totals = np.bincount(codes[inside], shares[inside], minlength=num_tokens**k)
    return totals / max(totals.sum(), 1e-300)
