"""Judging a masked-diffusion generator: exactly for short sequences, from samples always.

Exact figures are of the law in which positions are revealed one at a time, in random order.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from actors.denoising import draw_sequences
from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import Oracle
from actors.trajectories import TrajectoryBatch
from distributed.config import ConfigError, ExperimentConfig
from distributed.evaluation import EvaluatedSamples, ExactLaw, exact_wanted
from distributed.experiment import (
    derive_seed,
    make_denoiser,
    make_motif_law,
    need_enumeration,
    offline_sequences,
)
from learner.drakes import exact
from learner.drakes.config import DrakesConfig
from learner.drakes.constraints import violation_metrics
from learner.drakes.diffusion import nelbo
from learner.drakes.filters import FilterConfig
from learner.drakes.metrics import Reference, design_metrics, likelihood_z
from learner.drakes.reward_model import RewardModel
from learner.drakes.trajectories import trajectory_log_probs
from learner.exact import jensen_shannon, kl_divergence, total_variation
from learner.flat import FlatParameters
from learner.gflownet import EvaluationWeights
from learner.metrics import novelty, sample_metrics
from learner.rewards import valid_scores

NELBO_DRAWS = 8
"""Estimates averaged for the likelihood of a sequence."""
PATH_KL_SAMPLES = 256
"""Samples that the KL of the paths is estimated from where it is not known exactly."""
MAX_REFERENCE = 2000
"""Offline sequences that designs are compared with."""


class ExactReference(NamedTuple):
    """What the exact figures need of the pretrained model."""

    weights: torch.Tensor
    """float32 [P]: its parameters."""
    table: torch.Tensor
    """float32 [S, L, V]: its `log_prob_table`."""
    law: np.ndarray
    """float64 [n]."""


class DesignEvaluator:
    """Evaluates weights of a denoiser beside those it was pretrained to; the counterpart of `Evaluator`."""

    def __init__(self, config: ExperimentConfig, environment: SequenceEnvironment, oracle: Oracle):
        """Raises ConfigError if an exact evaluation is asked for that cannot be had, or if there is no data."""
        assert isinstance(config.generator, DrakesConfig)
        self.config, self.environment, self.oracle, self.generator = config, environment, oracle, config.generator
        self.denoiser, self.pretrained = make_denoiser(config).eval(), make_denoiser(config).eval()
        self._weights, self._pretrained_weights = FlatParameters(self.denoiser), FlatParameters(self.pretrained)
        self.reward_model = RewardModel(self.generator.reward_model, self.denoiser.length, seed=0)
        if config.generator.alpha.mode == "reward" and not oracle.enumerable:
            raise ConfigError(
                "generator.alpha.mode: reward needs the scores of the offline sequences, which only a table has at hand; "
                "allowed: kl, fixed"
            )
        self.is_exact = exact_wanted(config, environment, oracle)
        offline = offline_sequences(config, environment, oracle)
        assert offline is not None
        self._offline = offline[0]
        rng = np.random.default_rng(derive_seed(config.run.seed, "reference"))
        self._law = make_motif_law(config)
        self._reference = (
            self._offline[rng.permutation(len(self._offline))[:MAX_REFERENCE]]
            if self._law is None
            else self._law.sample(MAX_REFERENCE, rng)
        )
        self._reference_law: ExactReference | None = None
        if self.is_exact:
            self._enumerate()

    def _enumerate(self) -> None:
        need_enumeration(self.environment)
        length = self.environment.space.max_length
        self._tokens = exact.all_strings(self.denoiser.num_tokens, length).numpy()
        self.scores = self.oracle.score(self._tokens, np.full(len(self._tokens), length))
        if not np.isfinite(self.scores).all():
            raise ConfigError("oracle: some sequences have no score; set evaluation.exact to never")
        weights = self.denoiser.num_tokens ** np.arange(length - 1, -1, -1)
        self._is_offline = np.isin(self._tokens @ weights, self._offline @ weights)

    def load(self, weights: EvaluationWeights) -> None:
        """Take over the weights to judge; raises ValueError if they belong to other networks."""
        self._weights.load(weights.policy)
        self._pretrained_weights.load(weights.dynamics)

    @torch.no_grad()
    def exact_metrics(self, weights: EvaluationWeights) -> tuple[dict[str, float], ExactLaw]:
        """The exact law beside the optimum p* ∝ p_pre exp(r / alpha), and the objective beside its largest value."""
        self.load(weights)
        alpha = self.generator.objective_alpha
        reference = self._exact_reference()
        table, pretrained = exact.log_prob_table(self.denoiser), reference.law
        law = exact.any_order_law(table).numpy()
        path_kl = float(exact.path_kl(table, reference.table))
        best, objective_star = exact.optimum(pretrained, self.scores.astype(np.float64), alpha)
        mean = float(law @ self.scores)
        metrics = {
            "exact_nll": float(-np.log(law[self._is_offline]).mean()),
            "exact_nelbo": float(exact.nelbo_of_all(table).numpy()[self._is_offline].mean()),
            "path_kl": path_kl,
            "objective_j": mean - alpha * path_kl,
            "objective_j_star": objective_star,
            "exact_mean_score": mean,
            "pretrained_nll": float(-np.log(pretrained[self._is_offline]).mean()),
            "pretrained_mean_score": float(pretrained @ self.scores),
            "frontier_score": exact.best_reward(pretrained, self.scores.astype(np.float64), path_kl),
            "entropy": float(-(law * np.log(np.maximum(law, 1e-300))).sum()),
            "exact_tv": total_variation(best, law),
            "exact_kl": kl_divergence(best, law),
            "exact_jsd": jensen_shannon(best, law),
            "target_mean_score": float(best @ self.scores),
        }
        return metrics, ExactLaw(law=law, target=best, scores=self.scores)

    def _exact_reference(self) -> "ExactReference":
        """Of the loaded pretrained model, which stays the same all through fine-tuning: computed once."""
        vector = self._pretrained_weights.vector.detach()
        if self._reference_law is None or not torch.equal(self._reference_law.weights, vector):
            table = exact.log_prob_table(self.pretrained)
            self._reference_law = ExactReference(vector.clone(), table, exact.any_order_law(table).numpy())
        return self._reference_law

    def samples(
        self, weights: EvaluationWeights, count: int, *, seed: int, noise: bool = True,
        template: torch.Tensor | None = None, filters: FilterConfig | None = None,
    ) -> TrajectoryBatch:  # fmt: skip
        """`count` scored sequences of the averaged generator; there is no noise to be left out."""
        self.load(weights)
        batch = draw_sequences(
            self.denoiser, count, self.generator.rollout, seed=seed, template=template, filters=filters
        )
        batch.scores[:] = self.oracle.score(batch.tokens, self.environment.lengths(batch.tokens, batch.num_steps))
        return batch

    def sample_metrics(self, weights: EvaluationWeights) -> tuple[dict[str, float], EvaluatedSamples]:
        """Score, diversity, likeness to the offline data and rules kept, of `evaluation.num_samples` samples."""
        seed = derive_seed(self.config.run.seed, "evaluation")
        drawn = self.samples(weights, self.config.evaluation.num_samples, seed=seed)
        samples = drawn[valid_scores(drawn.scores)]
        metrics = self.metrics_of(drawn)
        real = self._likelihoods(self._reference, seed)
        reference = Reference(self._reference, real)
        if not self.is_exact:
            metrics["path_kl"] = self._path_kl(samples)
        metrics |= self._true_likelihoods(samples.tokens) | {"pretrained_nelbo": -float(real.mean())}
        found = design_metrics(
            samples.tokens, samples.scores, reference, self.generator.metrics,
            np.random.default_rng(derive_seed(seed, "bootstrap")),
            predicted=self._predict(weights, samples.tokens), log_likelihoods=self._likelihoods(samples.tokens, seed),
        )  # fmt: skip
        kept = ("gc_", "kmer_correlation", "likelihood_z", "nearest_hamming", "reference_hamming", "reward_gap")
        metrics |= {name: value for name, value in found.items() if name.startswith(kept)}
        if self.generator.constraints:
            metrics |= violation_metrics(self.generator.constraints, torch.from_numpy(samples.tokens.astype(np.int64)))
        return metrics, EvaluatedSamples(samples, None, None)

    def _predict(self, weights: EvaluationWeights, tokens: np.ndarray) -> np.ndarray | None:
        """float32 [n]: what the reward model says of sequences, in the oracle's units; None if the learner has none."""
        if weights.reward is None:
            return None
        self.reward_model.load_vector(weights.reward)
        return self.reward_model.predict(tokens)

    @torch.no_grad()
    def _likelihoods(self, tokens: np.ndarray, seed: int) -> np.ndarray:
        """float64 [n]: log-likelihood under the pretrained model by its NELBO [nats]."""
        generator = torch.Generator().manual_seed(seed)
        given = torch.from_numpy(tokens.astype(np.int64))
        return -np.mean([nelbo(self.pretrained, given, generator).numpy() for _ in range(NELBO_DRAWS)], 0)

    @torch.no_grad()
    def _path_kl(self, drawn: TrajectoryBatch) -> float:
        """KL of the paths to the pretrained model by the log-ratio of the first `PATH_KL_SAMPLES` samples [nats]."""
        some = drawn[:PATH_KL_SAMPLES]
        tokens, steps = (torch.from_numpy(array.astype(np.int64)) for array in (some.tokens, some.actions))
        pretrained = trajectory_log_probs(self.pretrained, tokens, steps, self.generator.rollout.num_steps)
        return float(some.log_behaviour.sum(1).mean() - pretrained.sum(1).mean())

    def _true_likelihoods(self, tokens: np.ndarray) -> dict[str, float]:
        """Of designs int [n, L], where the law of the data is known [nats]; the z score is to be read from both sides."""
        if self._law is None:
            return {}
        ours, real = self._law.log_prob(tokens), self._law.log_prob(self._reference)
        return {
            "true_log_prob": float(ours.mean()),
            "true_log_prob_z": likelihood_z(ours, real),
            "data_entropy": -float(real.mean()),
        }

    def metrics_of(self, drawn: TrajectoryBatch) -> dict[str, float]:
        """Score, diversity and novelty of scored sequences, the rejected ones left out."""
        samples = drawn[valid_scores(drawn.scores)]
        metrics = sample_metrics(samples.tokens, samples.scores, self.config.evaluation)
        if self.oracle.reference is not None:
            sequences = self.environment.sequences(samples.tokens, samples.num_steps)
            metrics["novelty"] = novelty(sequences, self.oracle.reference)
        return metrics | {"num_rejected_samples": len(drawn) - len(samples)}

    def interim(self, weights: EvaluationWeights) -> dict[str, float]:
        """What is judged at intervals: the exact law if there is one, and samples where scoring them is cheap."""
        metrics = self.exact_metrics(weights)[0] if self.is_exact else {}
        return metrics | (self.sample_metrics(weights)[0] if self.oracle.enumerable else {})

    @torch.no_grad()
    def draw_plots(self, folder: Path, law: ExactLaw | None) -> None:
        """The frontier of reward and KL, and the generator's place, where it is known exactly; raises OSError."""
        if law is None:
            return
        from distributed import plots

        reference, alphas = self._exact_reference(), np.geomspace(0.01, 2.0, 40)
        points = exact.frontier(reference.law, self.scores.astype(np.float64), alphas)
        path_kl = float(exact.path_kl(exact.log_prob_table(self.denoiser), reference.table))
        reached = (path_kl, float(law.law @ self.scores))
        plots.frontier([(point.path_kl, point.reward) for point in points], reached, folder / "frontier.png")
