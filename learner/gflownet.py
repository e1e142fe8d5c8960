"""The GFlowNet learner: one call trains policy, flows and dynamics model on a batch of trajectories.

Shapes: B batch, T steps, A actions, N distinct prefixes.
"""

import copy
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from learner.configs import StrictConfig
from learner.dynamics import DynamicsConfig, DynamicsModel
from learner.flat import FlatParameters
from learner.networks import NetworkConfig
from learner.networks.prefixes import PrefixIndex, index_prefixes
from learner.objectives import balance
from learner.policy import Policy, PolicyOutputs
from learner.rewards import RewardConfig, log_reward
from learner.schedules import learning_rate_factor
from learner.space import SequenceSpace


class ObjectiveConfig(StrictConfig):
    """What the policy and the flows are trained to satisfy."""

    name: Literal["sgfn_db", "gfn_db"] = "sgfn_db"
    """sgfn_db: detailed balance with the learned dynamics; gfn_db: without (exact only if noise is 0)."""
    backward: Literal["posterior", "learned"] = "posterior"
    """sgfn_db: P_B(a|s') by Bayes from policy and dynamics, or a softmax head limited to possible actions."""
    backward_support: float = Field(1e-3, gt=0, lt=1)
    """backward learned: an action is possible if the dynamics model gives the outcome more than this probability."""

    @property
    def uses_dynamics(self) -> bool:
        """Whether a dynamics model is trained."""
        return self.name != "gfn_db"

    @property
    def uses_backward_head(self) -> bool:
        """Whether the policy network needs a head for P_B."""
        return self.uses_dynamics and self.backward == "learned"


class LearnerConfig(StrictConfig):
    """How the learner takes its gradient steps."""

    batch_size: int = Field(256, ge=1, le=1_000_000)
    """Trajectories in a gradient step of the policy."""
    learning_rate: float = Field(2e-3, gt=0, le=1)
    """Adam step size of policy and flows."""
    final_learning_rate: float = Field(0.02, gt=0, le=1)
    """Share of the step size that is left at the end of the run (cosine decay)."""
    warmup_steps: int = Field(50, ge=0)
    """Learner steps over which the step size rises to its full value."""
    max_gradient_norm: float = Field(10.0, gt=0)
    """L2 norm to which gradients are clipped."""
    ema_decay: float = Field(0.995, ge=0, lt=1)
    """Decay per learner step of the averaged policy that is evaluated and sampled; 0: no averaging."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the networks; losses and weights are always float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner computes; auto: the GPU if there is one."""


class Trajectories(Protocol):
    """The arrays of a trajectory batch that the learner reads."""

    @property
    def tokens(self) -> np.ndarray:
        """int [B, T]: realised."""

    @property
    def actions(self) -> np.ndarray:
        """int [B, T]: intended."""

    @property
    def num_steps(self) -> np.ndarray:
        """int [B]."""

    @property
    def scores(self) -> np.ndarray:
        """float [B]: raw scores."""

    def __len__(self) -> int: ...


class EvaluationWeights(NamedTuple):
    """What evaluation and sampling need of a learner."""

    step: int
    """Learner steps taken."""
    policy: np.ndarray
    """float32 [P]: parameters of the averaged policy."""
    dynamics: np.ndarray
    """float32 [Q]: parameters of the dynamics model."""


class TensorBatch:
    """Trajectories on the learner's device, with the index of their distinct prefixes."""

    def __init__(self, batch: Trajectories, num_actions: int, device: torch.device, *, finished: bool):
        index: PrefixIndex = index_prefixes(batch.tokens, batch.num_steps, num_actions, finished=finished)
        self.rows = torch.from_numpy(index.rows).to(device)
        self.inverse = torch.from_numpy(index.inverse).to(device)
        self.tokens = torch.from_numpy(batch.tokens.astype(np.int64)).to(device)
        self.actions = torch.from_numpy(batch.actions.astype(np.int64)).to(device)
        self.num_steps = torch.from_numpy(batch.num_steps.astype(np.int64)).to(device)
        self.scores = torch.from_numpy(np.array(batch.scores, dtype=np.float32)).to(device)
        self.mask = balance.step_mask(self.num_steps, self.tokens.shape[1])

    def of_prefixes(self, values: Tensor) -> Tensor:
        """From values [N, ...] of distinct prefixes to [B, T+1, ...] of all."""
        return values[self.inverse]


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
    ):
        self.space, self.objective, self.reward, self.config = space, objective, reward, learner
        self.dynamics_config, self.total_steps = dynamics, total_steps
        self.device = resolve_device(learner.device)
        self.uses_dynamics = objective.uses_dynamics
        self.uses_backward_head = objective.uses_backward_head
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = Policy(space, network, backward_head=self.uses_backward_head).to(self.device)
            self.dynamics = DynamicsModel(space, dynamics.network).to(self.device)
        self.policy_weights = FlatParameters(self.policy)
        self.dynamics_weights = FlatParameters(self.dynamics)
        self.averaged = self.policy_weights.vector.detach().clone()
        self.policy_optimiser = _adam(self.policy_weights, learner.learning_rate)
        self.dynamics_optimiser = _adam(self.dynamics_weights, dynamics.learning_rate)
        self.step = 0

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
        return metrics | {"learning_rate": self.policy_optimiser.param_groups[0]["lr"]}

    def _step(self, trajectories: Trajectories, triples: list[Trajectories]) -> dict[str, Tensor]:
        factor = learning_rate_factor(
            self.step, self.total_steps, warmup=self.config.warmup_steps, final=self.config.final_learning_rate
        )
        _set_learning_rate(self.policy_optimiser, self.config.learning_rate * factor)
        _set_learning_rate(self.dynamics_optimiser, self.dynamics_config.learning_rate * factor)
        batch = self._to_device(trajectories, finished=self.uses_backward_head)
        metrics = {}
        if self.uses_dynamics:
            replayed = [self._to_device(part, finished=False) for part in triples if len(part)]
            for part in replayed or [batch]:
                metrics["dynamics_ce"] = self._dynamics_step(part)
        metrics |= self._policy_step(batch)
        self.step += 1
        return metrics

    def _to_device(self, trajectories: Trajectories, *, finished: bool) -> TensorBatch:
        return TensorBatch(trajectories, self.space.num_actions, self.device, finished=finished)

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _dynamics_step(self, batch: TensorBatch) -> Tensor:
        """Cross-entropy of the realised tokens, in nats a step; one Adam step."""
        self.dynamics_weights.zero_grad()
        with self._autocast():
            log_dynamics = self.dynamics(batch.tokens, batch.rows)
        chosen = log_dynamics[batch.inverse[:, :-1], batch.actions, batch.tokens]
        loss = -torch.where(batch.mask, chosen, 0.0).sum() / batch.mask.sum()
        loss.backward()
        self.dynamics_weights.clip_gradient(self.config.max_gradient_norm)
        self.dynamics_optimiser.step()
        return loss

    def _policy_step(self, batch: TensorBatch) -> dict[str, Tensor]:
        self.policy_weights.zero_grad()
        with self._autocast():
            outputs = self.policy(batch.tokens, batch.rows)
        rewards = log_reward(batch.scores, self.reward, step=self.step)
        residuals = self._residuals(batch, outputs, rewards)
        loss = balance.mean_square(residuals, batch.mask)
        loss.backward()
        norm = self.policy_weights.clip_gradient(self.config.max_gradient_norm)
        self.policy_optimiser.step()
        self._average()
        return {"loss": loss, "gradient_norm": norm, "log_z": outputs.log_flow[0], "batch_score": batch.scores.mean()}

    def _residuals(self, batch: TensorBatch, outputs: PolicyOutputs, rewards: Tensor) -> Tensor:
        log_flow = balance.end_flows(batch.of_prefixes(outputs.log_flow), rewards, batch.num_steps)
        log_policy = batch.of_prefixes(outputs.log_policy)[:, :-1]
        log_pf = log_policy.gather(-1, batch.actions[..., None]).squeeze(-1)
        if not self.uses_dynamics:
            return balance.gfn_db_residuals(log_flow, log_pf, batch.mask)
        log_dynamics = self._outcome_log_probs(batch)
        if self.objective.backward == "posterior":
            log_pb = balance.posterior_log_pb(log_policy, log_dynamics, batch.actions)
        else:
            assert outputs.backward_logits is not None
            logits = batch.of_prefixes(outputs.backward_logits)[:, 1:].masked_fill(log_policy.isneginf(), -torch.inf)
            support = self.objective.backward_support
            log_pb = balance.learned_log_pb(logits, log_dynamics, batch.actions, support=support)
        taken = log_dynamics.gather(-1, batch.actions[..., None]).squeeze(-1)
        return balance.sgfn_db_residuals(log_flow, log_pf, taken, log_pb, batch.mask)

    @torch.no_grad()
    def _outcome_log_probs(self, batch: TensorBatch) -> Tensor:
        """log P̂(x_t|s_t,a) of the realised token for every action, [B, T, A], detached."""
        with self._autocast():
            log_dynamics = self.dynamics(batch.tokens, batch.rows)
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
            "policy": self.policy_weights.vector.detach().clone(),
            "averaged": self.averaged.clone(),
            "dynamics": self.dynamics_weights.vector.detach().clone(),
            "policy_optimiser": copy.deepcopy(self.policy_optimiser.state_dict()),
            "dynamics_optimiser": copy.deepcopy(self.dynamics_optimiser.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; raises ValueError if it belongs to a network of another size."""
        self.policy_weights.load(state["policy"])
        self.dynamics_weights.load(state["dynamics"])
        self.averaged.copy_(state["averaged"])
        self.policy_optimiser.load_state_dict(copy.deepcopy(state["policy_optimiser"]))
        self.dynamics_optimiser.load_state_dict(copy.deepcopy(state["dynamics_optimiser"]))
        self.step = int(state["step"])


def resolve_device(device: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here; raises ValueError for cuda where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("learner.device: 'cuda' was asked for, but torch finds no GPU here; allowed: auto, cpu")
    return torch.device(device)


def _adam(weights: FlatParameters, learning_rate: float) -> torch.optim.Adam:
    return torch.optim.Adam([weights.vector], lr=learning_rate, fused=True)


def _set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = value


def _split(batch: Any, count: int) -> list[Any]:
    """`count` parts of nearly equal size, in order."""
    edges = np.linspace(0, len(batch), count + 1).astype(int)
    return [batch[start:end] for start, end in pairwise(edges)]
