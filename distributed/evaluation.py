"""Judging a sampler: exactly where the space can be enumerated, from samples always."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import Oracle
from actors.rollout import draw_trajectories
from actors.trajectories import TrajectoryBatch
from distributed.config import ConfigError, ExperimentConfig
from distributed.experiment import derive_seed, make_policy, need_enumeration
from learner import exact, sampled
from learner.dynamics import DynamicsModel
from learner.flat import FlatParameters
from learner.gflownet import EvaluationWeights
from learner.metrics import novelty, sample_metrics
from learner.rewards import valid_log_rewards, valid_scores

MAX_KMERS = 1_000_000


def _shown(size: int) -> str:
    return f"{size:,}" if size < 10**15 else f"about 10^{size.bit_length() * 0.30103:.0f}"


@dataclass(frozen=True, kw_only=True)
class ExactLaw:
    """The sampler's law beside the target, over all n finished sequences."""

    law: np.ndarray
    """float64 [n]."""
    target: np.ndarray
    """float64 [n]."""
    scores: np.ndarray
    """float32 [n]: raw scores; NaN where a sequence is rejected."""


def exact_wanted(config: ExperimentConfig, environment: SequenceEnvironment, oracle: Oracle) -> bool:
    """Whether the law over the whole space is to be computed; raises ConfigError if it is asked for and too large."""
    evaluation, size = config.evaluation, environment.space.num_sequences
    fits = size <= evaluation.max_sequences
    if evaluation.exact == "always" and not fits:
        raise ConfigError(
            f"evaluation.exact: got 'always', but the space has {_shown(size)} sequences; allowed: up to "
            f"evaluation.max_sequences = {evaluation.max_sequences:,}"
        )
    return fits and (evaluation.exact == "always" or (evaluation.exact == "auto" and oracle.enumerable))


class EvaluatedSamples(NamedTuple):
    """Scored samples and what they stand for."""

    trajectories: TrajectoryBatch
    """The samples with a valid score."""
    target_weights: np.ndarray | None
    """float64 [n]: shares under which they count as samples of the target; None if the exact law is known."""
    kmers: tuple[np.ndarray, np.ndarray] | None
    """float64 [V^k] each: frequencies of k-mers in the samples, and in the target by those shares."""


class Evaluator:
    """Evaluates weights against the configured target; holds the enumerated target, so that it is made once."""

    def __init__(self, config: ExperimentConfig, environment: SequenceEnvironment, oracle: Oracle):
        """Raises ConfigError if an exact evaluation is asked for that cannot be had."""
        self.config, self.environment, self.oracle = config, environment, oracle
        self.policy = make_policy(config, environment)
        self._policy_weights = FlatParameters(self.policy)
        self._dynamics = DynamicsModel(environment.space, config.dynamics.network)
        self._dynamics_weights = FlatParameters(self._dynamics)
        self._has_dynamics = config.objective.uses_dynamics
        if self.policy.thought_context and config.evaluation.exact == "always":
            raise ConfigError(
                "evaluation.exact: got 'always', but with network.thought_context the law depends on all strings of "
                "intentions; allowed: auto, never (distances are then estimated from samples)"
            )
        self.is_exact = not self.policy.thought_context and exact_wanted(config, environment, oracle)
        space = environment.space
        self._kmer_size = min(config.evaluation.kmer_size, space.max_length)
        if space.num_tokens**self._kmer_size > MAX_KMERS:
            raise ConfigError(
                f"evaluation.kmer_size: {space.num_tokens}^{self._kmer_size} k-mers; at most {MAX_KMERS:,} are allowed"
            )
        if self.is_exact:
            self._enumerate_target()

    def _enumerate_target(self) -> None:
        need_enumeration(self.environment)
        space = self.environment.space
        self.scores = self.oracle.score(*space.enumerate())
        valid = valid_scores(self.scores)
        if not valid.any():
            raise ConfigError("oracle: not one sequence of the space has a valid score")
        self.scores = np.where(valid, self.scores, np.nan)
        self._target = exact.target_tree(space, valid_log_rewards(self.scores, self.config.reward))
        try:
            floor = exact.replacement_floor(self.environment.kernel)
        except ValueError:
            self._kl_floor = self._tv_floor = float(
                "nan"
            )  # an attainable set of another form; excess_kl is then not reported
        else:
            self._kl_floor, self._tv_floor = exact.kl_floor(space, self._target, floor)

    def draw_plots(self, folder: Path, law: ExactLaw | None) -> None:
        """Nothing besides what every run shows."""

    def load(self, weights: EvaluationWeights) -> None:
        """Take over the weights to judge; raises ValueError if they belong to other networks."""
        self._policy_weights.load(weights.policy)
        self._dynamics_weights.load(weights.dynamics)

    def exact_metrics(self, weights: EvaluationWeights) -> tuple[dict[str, float], ExactLaw]:
        """Distances of the exact law to the target; see the metrics glossary in the README."""
        self.load(weights)
        space, kernel, target = self.environment.space, self.environment.kernel, self._target
        policies = exact.policy_tables(self.policy)
        law, reach = exact.realised_law(space, policies, kernel)
        metrics = self.distances(law) | {"log_z_error": self._log_z() - target.log_z}
        if self._has_dynamics and not self._dynamics.thought_context:
            metrics |= self._dynamics_metrics(policies, reach)
        return metrics, ExactLaw(law=law, target=target.law, scores=self.scores)

    def distances(self, law: np.ndarray) -> dict[str, float]:
        """Distances of a law float64 [n] of realised sequences to the target, and mean scores."""
        target, kl = self._target, exact.kl_divergence(self._target.law, law)
        metrics = {
            "exact_tv": exact.total_variation(target.law, law),
            "exact_kl": kl,
            "exact_jsd": exact.jensen_shannon(target.law, law),
            "exact_mean_score": float(np.nansum(law * self.scores)),
            "target_mean_score": float(np.nansum(target.law * self.scores)),
        }
        if np.isfinite(self._kl_floor):
            metrics |= {"kl_floor": self._kl_floor, "tv_floor": self._tv_floor, "excess_kl": kl - self._kl_floor}
        return metrics

    @torch.no_grad()
    def _log_z(self) -> float:
        return float(self.policy.at(self.policy.start()).log_flow)

    def _dynamics_metrics(self, policies: list[np.ndarray], reach: list[np.ndarray]) -> dict[str, float]:
        kernel = self.environment.kernel
        with np.errstate(divide="ignore", invalid="ignore"):
            entropies = -np.where(kernel > 0, kernel * np.log(kernel), 0.0).sum(-1)
        steps = [(r @ (p @ h), r.sum()) for r, p, h in zip(reach, policies, entropies, strict=True)]
        return {
            "dynamics_tv": exact.dynamics_error(self._dynamics, kernel, reach),
            "dynamics_ce_floor": float(sum(step[0] for step in steps) / sum(step[1] for step in steps)),
        }

    def samples(self, weights: EvaluationWeights, count: int, *, seed: int, noise: bool = True) -> TrajectoryBatch:
        """`count` scored trajectories of the averaged policy, with the environment's noise or without."""
        self.load(weights)
        process = self.environment.noise if noise else self.environment.intact
        batch = draw_trajectories(self.policy, self.environment, process, count, np.random.default_rng(seed))
        batch.scores[:] = self.oracle.score(batch.tokens, self.environment.lengths(batch.tokens, batch.num_steps))
        return batch

    def sample_metrics(self, weights: EvaluationWeights) -> tuple[dict[str, float], EvaluatedSamples]:
        """Score, diversity and novelty of `evaluation.num_samples` noisy samples, always drawn with the same numbers.

        Where there is no exact law, also the distances to the target that the samples' known probabilities give.
        """
        seed = derive_seed(self.config.run.seed, "evaluation")
        drawn = self.samples(weights, self.config.evaluation.num_samples, seed=seed)
        metrics, valid = self.metrics_of(drawn), valid_scores(drawn.scores)
        if self.is_exact:
            return metrics, EvaluatedSamples(drawn[valid], None, None)
        scores = np.where(valid, drawn.scores, 0)
        rewards = valid_log_rewards(drawn.scores, self.config.reward)
        log_probabilities = sampled.log_probabilities(self.policy, drawn, self.environment.kernel)
        metrics |= sampled.importance_metrics(
            log_probabilities, rewards, scores, np.random.default_rng(derive_seed(seed, "bootstrap"))
        )
        metrics["log_z_error"] = self._log_z() - metrics["log_z_estimate"]
        target = sampled.normalised_weights(log_probabilities, rewards)[valid]
        kmers = self._kmer_frequencies(drawn[valid], target)
        metrics["kmer_tv"] = exact.total_variation(*kmers)
        return metrics, EvaluatedSamples(drawn[valid], target, kmers)

    def metrics_of(self, drawn: TrajectoryBatch) -> dict[str, float]:
        """Score, diversity and novelty of scored trajectories, the rejected ones left out."""
        samples = drawn[valid_scores(drawn.scores)]
        lengths = self.environment.lengths(samples.tokens, samples.num_steps)
        actions = self.environment.as_actions(samples.tokens, lengths)
        metrics = sample_metrics(actions, samples.scores, self.config.evaluation)
        if self.oracle.reference is not None:
            metrics["novelty"] = novelty(self.environment.sequences(samples.tokens, lengths), self.oracle.reference)
        return metrics | {"num_rejected_samples": len(drawn) - len(samples)}

    def _kmer_frequencies(self, samples: TrajectoryBatch, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.environment.lengths(samples.tokens, samples.num_steps)
        num_tokens, size = self.environment.space.num_tokens, self._kmer_size
        ours = sampled.kmer_frequencies(
            samples.tokens, lengths, np.full(len(samples), 1 / len(samples)), num_tokens, size
        )
        return ours, sampled.kmer_frequencies(samples.tokens, lengths, target, num_tokens, size)

    def interim(self, weights: EvaluationWeights) -> dict[str, float]:
        """What is judged at intervals: the exact law if there is one, and samples where scoring them is cheap."""
        metrics = self.exact_metrics(weights)[0] if self.is_exact else {}
        return metrics | (self.sample_metrics(weights)[0] if self.oracle.enumerable else {})
