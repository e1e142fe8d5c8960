"""Judging a sampler: exactly where the space can be enumerated, from samples always."""

from dataclasses import dataclass

import numpy as np
import torch

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import Oracle, valid_scores
from actors.rollout import draw_trajectories
from actors.trajectories import TrajectoryBatch
from distributed.config import ConfigError, ExperimentConfig
from distributed.experiment import derive_seed, make_policy
from learner import exact
from learner.dynamics import DynamicsModel
from learner.flat import FlatParameters
from learner.gflownet import EvaluationWeights
from learner.metrics import novelty, sample_metrics
from learner.rewards import log_reward


@dataclass(frozen=True, kw_only=True)
class ExactLaw:
    """The sampler's law beside the target, over all n finished sequences."""

    law: np.ndarray
    """float64 [n]."""
    target: np.ndarray
    """float64 [n]."""
    scores: np.ndarray
    """float32 [n]: raw scores; NaN where a sequence is rejected."""


class Evaluator:
    """Evaluates weights against the configured target; holds the enumerated target, so that it is made once."""

    def __init__(self, config: ExperimentConfig, environment: SequenceEnvironment, oracle: Oracle):
        """Raises ConfigError if an exact evaluation is asked for that cannot be had."""
        self.config, self.environment, self.oracle = config, environment, oracle
        self._policy = make_policy(config, environment)
        self._policy_weights = FlatParameters(self._policy)
        self._dynamics = DynamicsModel(environment.space, config.dynamics.network)
        self._dynamics_weights = FlatParameters(self._dynamics)
        self._has_dynamics = config.objective.uses_dynamics
        self.is_exact = self._exact_wanted()
        if self.is_exact:
            self._enumerate_target()

    def _exact_wanted(self) -> bool:
        evaluation, size = self.config.evaluation, self.environment.space.num_sequences
        fits = size <= evaluation.max_sequences
        if evaluation.exact == "always" and not fits:
            raise ConfigError(
                f"evaluation.exact: got 'always', but the space has {size:,} sequences; allowed: up to "
                f"evaluation.max_sequences = {evaluation.max_sequences:,}"
            )
        return fits and (evaluation.exact == "always" or (evaluation.exact == "auto" and self.oracle.enumerable))

    def _enumerate_target(self) -> None:
        space = self.environment.space
        self._scores = self.oracle.score(*space.enumerate())
        valid = valid_scores(self._scores)
        if not valid.any():
            raise ConfigError("oracle: not one sequence of the space has a valid score")
        self._scores = np.where(valid, self._scores, np.nan)
        log_rewards = log_reward(torch.from_numpy(np.where(valid, self._scores, 0)), self.config.reward).numpy()
        self._target = exact.target_tree(space, np.where(valid, log_rewards.astype(np.float64), -np.inf))
        try:
            floor = exact.replacement_floor(self.environment.kernel)
        except ValueError:
            self._kl_floor = self._tv_floor = float(
                "nan"
            )  # an attainable set of another form; excess_kl is then not reported
        else:
            self._kl_floor, self._tv_floor = exact.kl_floor(space, self._target, floor)

    def load(self, weights: EvaluationWeights) -> None:
        """Take over the weights to judge; raises ValueError if they belong to other networks."""
        self._policy_weights.load(weights.policy)
        self._dynamics_weights.load(weights.dynamics)

    def exact_metrics(self, weights: EvaluationWeights) -> tuple[dict[str, float], ExactLaw]:
        """Distances of the exact law to the target; see the metrics glossary in the README."""
        self.load(weights)
        space, kernel, target = self.environment.space, self.environment.kernel, self._target
        policies = exact.policy_tables(self._policy)
        law, reach = exact.realised_law(space, policies, kernel)
        kl = exact.kl_divergence(target.law, law)
        with torch.no_grad():
            log_z = float(self._policy.at(self._policy.start()).log_flow)
        metrics = {
            "exact_tv": exact.total_variation(target.law, law),
            "exact_kl": kl,
            "exact_jsd": exact.jensen_shannon(target.law, law),
            "exact_mean_score": float(np.nansum(law * self._scores)),
            "target_mean_score": float(np.nansum(target.law * self._scores)),
            "log_z_error": log_z - target.log_z,
        }
        if np.isfinite(self._kl_floor):
            metrics |= {"kl_floor": self._kl_floor, "tv_floor": self._tv_floor, "excess_kl": kl - self._kl_floor}
        if self._has_dynamics:
            metrics |= self._dynamics_metrics(policies, reach)
        return metrics, ExactLaw(law=law, target=target.law, scores=self._scores)

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
        batch = draw_trajectories(self._policy, self.environment, process, count, np.random.default_rng(seed))
        batch.scores[:] = self.oracle.score(batch.tokens, self.environment.lengths(batch.tokens, batch.num_steps))
        return batch

    def sample_metrics(self, weights: EvaluationWeights) -> tuple[dict[str, float], TrajectoryBatch]:
        """Score, diversity and novelty of `evaluation.num_samples` noisy samples, always drawn with the same numbers."""
        evaluation = self.config.evaluation
        drawn = self.samples(weights, evaluation.num_samples, seed=derive_seed(self.config.run.seed, "evaluation"))
        samples = drawn[valid_scores(drawn.scores)]
        lengths = self.environment.lengths(samples.tokens, samples.num_steps)
        metrics = sample_metrics(self.environment.as_actions(samples.tokens, lengths), samples.scores, evaluation)
        if self.oracle.reference is not None:
            metrics["novelty"] = novelty(self.environment.sequences(samples.tokens, lengths), self.oracle.reference)
        return metrics | {"num_rejected_samples": len(drawn) - len(samples)}, samples

    def interim(self, weights: EvaluationWeights) -> dict[str, float]:
        """What is judged at intervals: the exact law if there is one, and samples where scoring them is cheap."""
        metrics = self.exact_metrics(weights)[0] if self.is_exact else {}
        return metrics | (self.sample_metrics(weights)[0] if self.oracle.enumerable else {})
