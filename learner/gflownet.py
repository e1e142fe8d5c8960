"""The GFlowNet learner: one call trains policy, flows and dynamics model on a batch of trajectories.

Shapes: B batch, T steps, A actions, N distinct prefixes.
"""

import math
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from learner.batch import TensorBatch, Trajectories
from learner.configs import StrictConfig
from learner.dynamics import DynamicsConfig, DynamicsModel
from learner.flat import FlatAdam, FlatParameters
from learner.networks import NetworkConfig
from learner.networks.context import Context, ContextShape
from learner.objectives.balance import end_flows
from learner.objectives.config import ObjectiveConfig
from learner.objectives.losses import StepLogProbs, objective_loss
from learner.policy import Policy, PolicyOutputs
from learner.precision import Precision, autocast, resolve_precision
from learner.rewards import RewardConfig, log_reward
from learner.schedules import learning_rate_factor
from learner.space import SequenceSpace

ADAM_BETAS = (0.9, 0.99)
"""A shorter memory of squared gradients than usual: embeddings of rare k-mers are seldom touched."""


class LearnerConfig(StrictConfig):
    """How the learner takes its gradient steps."""

    batch_size: int = Field(256, ge=1, le=1_000_000)
    """Trajectories in a gradient step of the policy."""
    learning_rate: float = Field(6e-3, gt=0, le=1)
    """Adam step size of policy and flows."""
    final_learning_rate: float = Field(0.02, gt=0, le=1)
    """Share of the step size that is left at the end of the run (cosine decay)."""
    warmup_steps: int = Field(50, ge=0)
    """Learner steps over which the step size rises to its full value."""
    max_gradient_norm: float = Field(10.0, gt=0)
    """L2 norm to which gradients are clipped."""
    ema_decay: float = Field(0.995, ge=0, lt=1)
    """Decay per learner step of the averaged policy that is evaluated and sampled; 0: no averaging."""
    precision: Precision = "float32"
    """Arithmetic of the networks in training and rollouts; auto: bfloat16 where the processor multiplies it natively (AVX-512
    BF16, AMX, recent GPUs), else float32. Losses and weights are always float32, and so is every evaluation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner computes; auto: the GPU if there is one."""


class EvaluationWeights(NamedTuple):
    """What evaluation and sampling need of a learner."""

    step: int
    """Learner steps taken."""
    policy: np.ndarray
    """float32 [P]: parameters of the averaged policy."""
    dynamics: np.ndarray
    """float32 [Q]: parameters of the dynamics model."""
    reward: np.ndarray | None = None
    """float32 [R]: state of the reward model that the learner follows; None if it follows the oracle itself."""


class GFlowNetLearner:
    """Trains pi(a|s), F(s) and P̂(x|s,a) on trajectories; never told the environment's noise."""

    def __init__(
        self,
        space: SequenceSpace,
        *,
        network: NetworkConfig,
        objective: ObjectiveConfig,
        dynamics: DynamicsConfig,
        reward: RewardConfig,
        learner: LearnerConfig,
        total_steps: int,
        seed: int,
        shape: ContextShape | None = None,
    ):
        """`shape`: of the windows that the networks read, if they read any."""
        self.space, self.objective, self.reward, self.config = space, objective, reward, learner
        self.dynamics_config, self.total_steps = dynamics, total_steps
        self.device = resolve_device(learner.device)
        self.precision = resolve_precision(learner.precision, self.device)
        self.uses_dynamics = objective.uses_dynamics
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = Policy(space, network, **objective.policy_heads, shape=shape).to(self.device)
            self.dynamics = DynamicsModel(space, dynamics.network, shape).to(self.device)
        self.policy_weights = FlatParameters(self.policy)
        self.dynamics_weights = FlatParameters(self.dynamics)
        self.averaged = self.policy_weights.vector.detach().clone()
        self.policy_optimiser = self._make_policy_optimiser()
        self.dynamics_optimiser = FlatAdam(
            self.dynamics_weights, [(slice(None), dynamics.learning_rate)], betas=ADAM_BETAS
        )
        self.step, self._is_warm = 0, False

    def start_from(self, weights: EvaluationWeights) -> None:
        """Begin with trained weights, at step 0 and with fresh optimisers; raises ValueError if they do not fit."""
        self.policy_weights.load(weights.policy)
        self.dynamics_weights.load(weights.dynamics)
        self.averaged.copy_(self.policy_weights.vector.detach())
        self._is_warm = True

    @property
    def is_offline(self) -> bool:
        """Whether the next step needs no rollouts: never."""
        return False

    def offline_update(self, count: int) -> dict[str, float]:
        """Nothing to learn without rollouts."""
        return {}

    def take_designs(self) -> np.ndarray:
        """No sequences for the oracle but those of the rollouts."""
        return np.zeros((0, 0), np.int16)

    def _make_policy_optimiser(self) -> FlatAdam:
        """Log Z, where it is a parameter of its own, has its own step size."""
        whole, own = self.config.learning_rate, self.objective.log_z_step_size
        if own is None:
            return FlatAdam(self.policy_weights, [(slice(None), whole)], betas=ADAM_BETAS)
        assert self.policy.log_z is not None
        assert self.policy.log_z.data_ptr() == self.policy_weights.vector.data_ptr()
        return FlatAdam(self.policy_weights, [(slice(1, None), whole), (slice(1), own)], betas=ADAM_BETAS)

    def update(self, trajectories: Trajectories, replayed: Trajectories | None = None) -> dict[str, float]:
        """One or more learner steps: `trajectories`, in order, in batches of `batch_size`; `replayed`, spread over them.

        `replayed` trains the dynamics model only; without it (dynamics.mode on_policy, or nothing stored yet) the
        policy's batch does. Returns the mean of each metric over the steps.
        """
        count = max(1, round(len(trajectories) / self.config.batch_size))
        replayed_parts = _split(replayed, count * self.dynamics_config.num_rounds) if replayed else None
        totals: dict[str, Tensor] = {}
        for number, part in enumerate(_split(trajectories, count)):
            rounds = self.dynamics_config.num_rounds
            triples = replayed_parts[number * rounds : (number + 1) * rounds] if replayed_parts else []
            for name, value in self._step(part, triples).items():
                totals[name] = totals.get(name, 0.0) + value.detach()
        metrics = {name: float(value) / count for name, value in totals.items()}
        return metrics | {"learning_rate": self.policy_optimiser.learning_rates[0]}

    def _step(self, trajectories: Trajectories, triples: list[Trajectories]) -> dict[str, Tensor]:
        factor = learning_rate_factor(
            self.step, self.total_steps, warmup=self.config.warmup_steps, final=self.config.final_learning_rate
        )
        self.policy_optimiser.factor = self.dynamics_optimiser.factor = factor
        batch = self._to_device(trajectories, finished=self.objective.uses_backward_head)
        metrics = {}
        if self.uses_dynamics:
            replayed = [self._to_device(part, finished=False) for part in triples if len(part)]
            for part in replayed or [batch]:
                metrics["dynamics_ce"] = self._dynamics_step(part)
        metrics |= self._policy_step(batch)
        self.step += 1
        return metrics

    def _to_device(self, trajectories: Trajectories, *, finished: bool) -> TensorBatch:
        thoughts = self.policy.thought_context or self.dynamics.thought_context
        return TensorBatch(
            trajectories, self.space.num_actions, self.device, finished=finished, thought_context=thoughts
        )

    def _context(self, batch: TensorBatch) -> Context | None:
        """What the networks read besides prefixes: nothing."""
        return None

    def _autocast(self) -> torch.autocast:
        return autocast(self.precision, self.device)

    def _dynamics_step(self, batch: TensorBatch) -> Tensor:
        """Cross-entropy of the realised tokens, in nats a step; one Adam step."""
        self.dynamics_weights.zero_grad()
        with self._autocast():
            log_dynamics = self._log_dynamics(batch)
        chosen = log_dynamics[batch.inverse[:, :-1], batch.actions, batch.tokens]
        loss = -torch.where(batch.mask, chosen, 0.0).sum() / batch.mask.sum()
        loss.backward()
        self.dynamics_weights.clip_gradient(self.config.max_gradient_norm)
        self.dynamics_optimiser.step()
        return loss

    def _log_dynamics(self, batch: TensorBatch) -> Tensor:
        return self.dynamics(batch.symbols(self.dynamics.thought_context), batch.rows, self._context(batch))

    def _policy_step(self, batch: TensorBatch) -> dict[str, Tensor]:
        if self.step == 0 and not self._is_warm and not self.objective.policy_heads["values"]:
            self._guess_flows(batch)
        self.policy_weights.zero_grad()
        with self._autocast():
            context = self._context(batch)
            outputs = self.policy(batch.symbols(self.policy.thought_context), batch.rows, context)
        loss, metrics = self._loss(batch, outputs, context)
        loss.backward()
        norm = self.policy_weights.clip_gradient(self.config.max_gradient_norm)
        self.policy_optimiser.step()
        self._average()
        log_z = outputs.log_flow[: len(batch.contexts)].mean()  # one root for each window
        metrics |= {"gradient_norm": norm, "log_z": log_z, "batch_score": batch.scores.mean()}
        return {"loss": loss, **metrics}

    def _guess_flows(self, batch: TensorBatch) -> None:
        """The policy is still uniform, so log Z is about the log of the number of sequences + log mean R."""
        rewards = log_reward(batch.scores, self.reward, step=0)
        self.policy.shift_log_flow(rewards.logsumexp(0) - math.log(len(rewards)))

    def _loss(
        self, batch: TensorBatch, outputs: PolicyOutputs, context: Context | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with all its terms, and the parts as metrics."""
        return objective_loss(self._log_probs(batch, outputs))

    def _log_probs(self, batch: TensorBatch, outputs: PolicyOutputs) -> StepLogProbs:
        rewards = log_reward(batch.scores, self.reward, step=self.step)
        backward, ahead = outputs.backward_logits, outputs.lookahead_logits
        return StepLogProbs(
            config=self.objective,
            mask=batch.mask,
            num_steps=batch.num_steps,
            tokens=batch.tokens,
            actions=batch.actions,
            log_flow=end_flows(batch.of_prefixes(outputs.log_flow), rewards, batch.num_steps),
            log_policy=batch.of_prefixes(outputs.log_policy)[:, :-1],
            log_dynamics=self._outcome_log_probs(batch) if self.uses_dynamics else None,
            backward_logits=None if backward is None else batch.of_prefixes(backward)[:, 1:],
            lookahead_logits=None if ahead is None else batch.of_prefixes(ahead)[:, :-1],
            log_behaviour=batch.log_behaviour,
            log_reward=rewards,
        )

    @torch.no_grad()
    def _outcome_log_probs(self, batch: TensorBatch) -> Tensor:
        """log P̂(x_t|s_t,a) of the realised token for every action, [B, T, A], detached."""
        with self._autocast():
            log_dynamics = self._log_dynamics(batch)
        return log_dynamics.transpose(1, 2)[batch.inverse[:, :-1], batch.tokens]

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential moving average of the policy, with the usual correction while it is young."""
        decay = min(self.config.ema_decay, self.step / (self.step + 10))
        self.averaged.lerp_(self.policy_weights.vector, 1 - decay)

    def weights(self) -> np.ndarray:
        """A copy of the policy's parameters, float32 [P], for rollout workers."""
        return self.policy_weights.vector.detach().cpu().numpy().copy()

    def evaluation_weights(self) -> EvaluationWeights:
        """A copy of the averaged policy and of the dynamics model."""
        policy, dynamics = self.averaged, self.dynamics_weights.vector.detach()
        return EvaluationWeights(self.step, policy.cpu().numpy().copy(), dynamics.cpu().numpy().copy())

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that training goes on from: plain tensors and numbers."""
        return {
            "step": self.step,
            "is_warm": self._is_warm,
            "policy": self.policy_weights.vector.detach().clone(),
            "averaged": self.averaged.clone(),
            "dynamics": self.dynamics_weights.vector.detach().clone(),
            "policy_optimiser": self.policy_optimiser.state_dict(),
            "dynamics_optimiser": self.dynamics_optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; raises ValueError if it is damaged or belongs to a network of another size."""
        for name in ("policy", "averaged", "dynamics"):
            if state[name].dtype != torch.float32 or not torch.isfinite(state[name]).all():
                raise ValueError(f"{name}: has weights that are not finite numbers (float32)")
        check_step(state["step"])
        self.policy_weights.load(state["policy"])
        self.dynamics_weights.load(state["dynamics"])
        if state["averaged"].shape != self.averaged.shape:
            raise ValueError(f"averaged: {tuple(state['averaged'].shape)} weights; allowed: {len(self.averaged)}")
        self.averaged.copy_(state["averaged"])
        self.policy_optimiser.load_state_dict(state["policy_optimiser"])
        self.dynamics_optimiser.load_state_dict(state["dynamics_optimiser"])
        self.step, self._is_warm = state["step"], bool(state.get("is_warm", False))


def resolve_device(device: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here; raises ValueError for cuda where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("learner.device: 'cuda' was asked for, but torch finds no GPU here; allowed: auto, cpu")
    return torch.device(device)


def check_step(step: Any) -> None:
    """Raises ValueError if `step` is no number of learner steps."""
    if type(step) is not int or not 0 <= step < 2**53:
        raise ValueError(f"step: got {str(step)[:40]!r}; allowed: a number of learner steps")


def _split(batch: Any, count: int) -> list[Any]:
    """`count` parts of nearly equal size, in order."""
    edges = np.linspace(0, len(batch), count + 1).astype(int)
    return [batch[start:end] for start, end in pairwise(edges)]
