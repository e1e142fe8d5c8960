"""The learner of the generator `forecast`: a GFlowNet over the tokens of a forecast, given a window of a time series.

The reward of a path ŷ is R = exp(-β · err(ŷ, y)), with the realised future y of the window, known while training. The
policy sees the window only. A balance objective, a squared log-ratio, therefore regresses on E[log R | window, ŷ]: the law
that it learns is ∝ exp(-β E[err(ŷ, y) | window]), not the law of y. With the mean squared error over P positions that is a
normal distribution around E[y | window] with variance P / 2β at each position, whatever the law of y. The likelihood terms
(`likelihood_weight`, `objective.lookahead_weight`) pull to the law of y itself.

Shapes: B trajectories, n windows, W steps, F features, P positions (steps of the horizon × targets), A = K bins.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from learner.batch import TensorBatch
from learner.configs import StrictConfig
from learner.gflownet import GFlowNetLearner
from learner.networks.context import Context, ContextShape
from learner.objectives.balance import at, marginal_log_pf
from learner.objectives.lookahead import lookahead_loss, lookahead_targets
from learner.objectives.losses import objective_loss
from learner.policy import PolicyOutputs
from learner.rewards import reward_exponent

ErrorName = Literal["mse", "mae"]


class ForecastConfig(StrictConfig):
    """A GFlowNet over future values of a time series (section data), set by the sections that also set gflownet."""

    name: Literal["forecast"]
    """Kind of generator."""
    error: ErrorName = "mse"
    """err in the reward exp(-β err), β = reward.exponent: mean squared or absolute error over a path, normalised units."""
    forward_looking: bool = True
    """Whether log F(s) is an output of the network plus the part of log R that the values so far have earned (Pan et al.
    2023, arXiv 2302.01687), which gives each step its own share of the error."""
    likelihood_weight: float = Field(0.0, ge=0)
    """Weight of the policy's cross-entropy on the true futures [nats a step], noise included."""
    value_weight: float = Field(0.0, ge=0)
    """Weight of the error (`error`) of the expected value along the true futures."""
    window_noise: float = Field(0.0, ge=0, le=10)
    """Standard deviation of noise added to windows while training, normalised units: against overfitting of short series."""
    paths_per_window: int = Field(8, ge=1, le=1_000_000)
    """Trajectories of a rollout call that continue the same window."""
    num_paths: int = Field(256, ge=2, le=1_000_000)
    """Paths that stand for a forecast when the generator is judged."""


class ForecastData(NamedTuple):
    """The training windows, as arrays."""

    windows: np.ndarray
    """float32 [n, W, F]."""
    futures: np.ndarray
    """float32 [n, P]: true future values, normalised."""
    tokens: np.ndarray
    """int16 [n, P]: their bins."""
    bin_values: np.ndarray
    """float32 [P, K]: what each bin stands for."""

    @property
    def shape(self) -> ContextShape:
        """Of a window."""
        return ContextShape(*self.windows.shape[1:])


def step_errors(predicted: Tensor, actual: Tensor, error: ErrorName) -> Tensor:
    """float [B, P]: squared or absolute error of each value, divided by P, so that a path's sum is its mean error."""
    difference = predicted - actual
    return (difference.square() if error == "mse" else difference.abs()) / difference.shape[-1]


class ForecastLearner(GFlowNetLearner):
    """Trains on trajectories that carry the number of the window that they continue."""

    def __init__(self, *arguments: Any, generator: ForecastConfig, data: ForecastData, seed: int, **sections: Any):
        super().__init__(*arguments, seed=seed, shape=data.shape, **sections)
        self.generator, self._seed = generator, seed
        self._windows = torch.from_numpy(data.windows).to(self.device)
        self._futures = torch.from_numpy(data.futures).to(self.device)
        self._tokens = torch.from_numpy(data.tokens.astype(np.int64)).to(self.device)
        self._bin_values = torch.from_numpy(data.bin_values).to(self.device)
        if generator.forward_looking:
            self.policy.flow_offset.copy_(self._flows_without_windows())

    def _flows_without_windows(self) -> Tensor:
        """float [P+1]: log Σ exp(-β E[err]) of the positions still to come, y being that of any window.

        Where the flows begin: from flows that are too low, the first gradients would make the policy certain of whatever
        it happened to draw.
        """
        errors = torch.stack(
            [step_errors(value, self._futures, self.generator.error).mean(0) for value in self._bin_values.T]
        )
        ahead = (-self.reward.exponent * errors).logsumexp(0).flip(0).cumsum(0).flip(0)
        return functional.pad(ahead, (0, 1))

    def _guess_flows(self, batch: TensorBatch) -> None:
        """Done already, where each position has its own share of the reward."""
        if not self.generator.forward_looking:
            super()._guess_flows(batch)

    def _context(self, batch: TensorBatch) -> Context:
        """The windows of the batch, the same noise added wherever a learner step asks for them."""
        windows = self._windows[torch.from_numpy(batch.contexts).to(self.device)]
        if self.generator.window_noise:
            source = torch.Generator().manual_seed((self._seed + self.step) % 2**63)
            noise = torch.randn(windows.shape, generator=source).to(self.device)
            windows = windows + self.generator.window_noise * noise
        return Context(windows, batch.of_context)

    def _loss(
        self, batch: TensorBatch, outputs: PolicyOutputs, context: Context | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective on the trajectories, and the terms on the true futures of their windows."""
        assert context is not None
        step = self._log_probs(batch, outputs)
        if self.generator.forward_looking:
            step = replace(step, log_flow=step.log_flow + self._earned(batch))
        loss, metrics = objective_loss(replace(step, lookahead_logits=None))
        on_futures, parts = self._future_terms(batch, context)
        return loss + on_futures, metrics | parts

    def _earned(self, batch: TensorBatch) -> Tensor:
        """float [B, P+1]: the part of log R that the values so far have earned; 0 at the end, whose flow is all of log R."""
        numbers = torch.from_numpy(batch.contexts).to(self.device)[batch.of_context]
        values = torch.take_along_dim(self._bin_values[None], batch.tokens[..., None], -1)[..., 0]
        errors = step_errors(values, self._futures[numbers], self.generator.error)
        earned = -reward_exponent(self.reward, self.step) * errors.cumsum(1)
        return functional.pad(earned[:, :-1], (1, 1))

    def _future_terms(self, batch: TensorBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Terms along the true future of each distinct window."""
        generator, weight = self.generator, self.objective.lookahead_weight
        if not (generator.likelihood_weight or generator.value_weight or weight):
            return torch.zeros((), device=self.device), {}
        numbers = torch.from_numpy(batch.contexts).to(self.device)
        tokens = self._tokens[numbers]
        count, steps = tokens.shape
        rows = torch.arange(count * (steps + 1), device=self.device)
        each = Context(context.windows, torch.arange(count, device=self.device))
        with self._autocast():
            outputs = self.policy(self._as_symbols(tokens, self.policy.thought_context), rows, each)
        log_policy = outputs.log_policy.view(count, steps + 1, -1)[:, :-1]
        log_outcome = self._outcome_law(log_policy, tokens, rows, each)
        likelihood = -at(log_outcome, tokens).mean()
        expected = (log_outcome.exp() * self._bin_values).sum(-1)
        error = step_errors(expected, self._futures[numbers], generator.error).sum(1).mean()
        loss = generator.likelihood_weight * likelihood + generator.value_weight * error
        metrics = {"future_ce": likelihood, "future_error": error}
        if outputs.lookahead_logits is not None:
            logits = outputs.lookahead_logits.unflatten(0, (count, steps + 1))[:, :-1]
            targets = lookahead_targets(
                tokens, torch.ones_like(tokens, dtype=torch.bool), self.objective.lookahead_steps
            )
            metrics["lookahead_ce"] = lookahead_loss(logits, targets)
            loss = loss + weight * metrics["lookahead_ce"]
        return loss, metrics

    def _outcome_law(self, log_policy: Tensor, tokens: Tensor, rows: Tensor, context: Context) -> Tensor:
        """log Σ_a π(a|s) P̂(x|s,a) float [n, P, A] of every token x after each prefix of `tokens` int64 [n, P]."""
        if not self.uses_dynamics:
            return log_policy
        with torch.no_grad(), self._autocast():
            log_dynamics = self.dynamics(self._as_symbols(tokens, self.dynamics.thought_context), rows, context)
        log_dynamics = log_dynamics.unflatten(0, (len(tokens), -1))[:, :-1]
        return marginal_log_pf(log_policy[..., None, :], log_dynamics.transpose(-1, -2))

    def _as_symbols(self, tokens: Tensor, thought_context: bool) -> Tensor:
        """What a network reads of true tokens, each of which counts as intended."""
        return tokens * self.space.num_actions + tokens if thought_context else tokens
