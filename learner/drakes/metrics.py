"""Metrics of designed DNA of one length. Shapes: n samples, m reference sequences, L positions; tokens A C G T = 0..3."""

from typing import NamedTuple

import numpy as np
from pydantic import Field

from learner.configs import StrictConfig
from learner.metrics import NoSampleError, mean_pairwise_hamming, unique_fraction
from learner.sampled import bootstrap, kmer_frequencies

_CHUNK_ENTRIES = 4_000_000


def gc_content(tokens: np.ndarray) -> np.ndarray:
    """Share of G and C of each of `tokens` int [n, L], float64 [n]."""
    return ((tokens == 1) | (tokens == 2)).mean(1)


def gc_rmse(tokens: np.ndarray, target: float) -> float:
    """Root mean squared distance of the sequences' GC content from `target`."""
    return float(np.sqrt(np.square(gc_content(tokens) - target).mean()))


def kmer_shares(tokens: np.ndarray, k: int) -> np.ndarray:
    """Share of each k-mer in `tokens` int [n, L], float64 [4^k]; every sequence weighs the same."""
    count, length = tokens.shape
    return kmer_frequencies(tokens, np.full(count, length), np.full(count, 1 / count), 4, k)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of `a` and `b` float [n]; NaN if either is constant."""
    a, b = (np.asarray(values, dtype=np.float64) - np.mean(values, dtype=np.float64) for values in (a, b))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks float64 [n] of `values` [n], from 0; ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse.reshape(-1)]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman correlation of `a` and `b` [n]; NaN if either is constant."""
    return correlation(ranks(a), ranks(b))


def nearest_hamming(tokens: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
    """Differing positions int64 [n] between each of `tokens` int [n, L] and the nearest row of `reference` int [m, L].

    Without a reference: the nearest other row of `tokens` itself. Raises NoSampleError where there is none.
    """
    others, (count, length) = tokens if reference is None else reference, tokens.shape
    if len(others) < 1 + (reference is None):
        raise NoSampleError("no other sequence to measure a distance to")
    letters = np.arange(max(tokens.max(initial=0), others.max(initial=0)) + 1)
    ours, theirs = ((rows[..., None] == letters).reshape(len(rows), -1).astype(np.float32) for rows in (tokens, others))
    nearest, step = np.empty(count, dtype=np.int64), max(1, _CHUNK_ENTRIES // len(others))
    for start in range(0, count, step):
        agreement = ours[start : start + step] @ theirs.T
        if reference is None:
            rows = np.arange(len(agreement))
            agreement[rows, start + rows] = -1
        nearest[start : start + step] = length - agreement.max(1)
    return nearest


def likelihood_z(log_likelihoods: np.ndarray, reference: np.ndarray) -> float:
    """How many standard deviations of `reference` [m] the mean of `log_likelihoods` [n] lies above that of `reference`.

    Both are log-likelihoods [nats] under the pretrained model, the reference's of held-out data. It is to be read from
    both sides: samples that are likelier than real data have collapsed onto a mode.
    """
    spread = float(np.std(reference, dtype=np.float64))
    shift = float(np.mean(log_likelihoods, dtype=np.float64) - np.mean(reference, dtype=np.float64))
    return shift / spread if spread > 0 else float("nan")


class DesignMetricsConfig(StrictConfig):
    """What designs are judged by, besides their rewards."""

    gc_target: float = Field(0.5, ge=0, le=1)
    """GC content from which `gc_rmse` is measured."""
    kmer_size: int = Field(3, ge=1, le=8)
    """Length of the k-mers of `kmer_correlation`."""


class Reference(NamedTuple):
    """Real sequences to compare designs with."""

    tokens: np.ndarray
    """int [m, L]."""
    log_likelihoods: np.ndarray | None = None
    """float [m]: nats under the pretrained model, of held-out data; None: not compared."""


def design_metrics(
    tokens: np.ndarray,
    rewards: np.ndarray,
    reference: Reference,
    config: DesignMetricsConfig,
    rng: np.random.Generator,
    *,
    predicted: np.ndarray | None = None,
    log_likelihoods: np.ndarray | None = None,
) -> dict[str, float]:
    """Metrics of designs `tokens` int [n, L] with oracle `rewards` float [n], and 95% bootstrap intervals.

    `predicted` float [n] are the reward model's, in the oracle's units: `reward_gap` = mean(predicted - rewards).
    `log_likelihoods` float [n] [nats] give `likelihood_z`. Those of distances and distinct sequences have no interval:
    resampling repeats sequences, which biases them. Raises NoSampleError for fewer than two designs.
    """
    if len(tokens) < 2:
        raise NoSampleError(f"design metrics need at least 2 sequences, got {len(tokens)}")
    shares = kmer_shares(reference.tokens, config.kmer_size)

    def estimates(rows: np.ndarray) -> dict[str, float]:
        values = {
            "mean_reward": float(rewards[rows].mean()),
            "median_reward": float(np.median(rewards[rows])),
            "gc_mean": float(gc_content(tokens[rows]).mean()),
            "gc_rmse": gc_rmse(tokens[rows], config.gc_target),
            "kmer_correlation": correlation(kmer_shares(tokens[rows], config.kmer_size), shares),
        }
        if predicted is not None:
            values["reward_gap"] = float((predicted[rows] - rewards[rows]).mean())
        if log_likelihoods is not None and reference.log_likelihoods is not None:
            values["likelihood_z"] = likelihood_z(log_likelihoods[rows], reference.log_likelihoods)
        return values

    return bootstrap(estimates, len(tokens), rng) | {
        "unique_fraction": unique_fraction(tokens),
        "mean_hamming": mean_pairwise_hamming(tokens),
        "nearest_hamming": float(nearest_hamming(tokens).mean()),
        "reference_hamming": float(nearest_hamming(tokens, reference.tokens).mean()),
    }
