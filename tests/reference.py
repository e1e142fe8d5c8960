"""Slow references that the tests compare the package with: NumPy, loops and plain probabilities, as the papers write.

Also the toys they run on: random kernels, policies and trajectories. Tables over prefixes are lists of T arrays whose
row `prefix_row(...)` belongs to the prefix, lexicographic, as in `learner.exact`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from actors.trajectories import TrajectoryBatch, empty_batch
from learner.dynamics import DynamicsConfig, DynamicsModel
from learner.gflownet import GFlowNetLearner, LearnerConfig
from learner.networks.mlp import MLPConfig, PrefixMLP
from learner.objectives.config import ObjectiveConfig
from learner.policy import Policy
from learner.rewards import RewardConfig
from learner.space import SequenceSpace

Tables = list[np.ndarray]
Law = dict[tuple[int, ...], float]


def fixed_space(num_tokens: int, length: int) -> SequenceSpace:
    return SequenceSpace(num_tokens=num_tokens, max_length=length, min_length=length)


def variable_space(num_tokens: int, max_length: int, min_length: int) -> SequenceSpace:
    return SequenceSpace(num_tokens=num_tokens, max_length=max_length, variable_length=True, min_length=min_length)


def randomise(module: nn.Module, seed: int, scale: float = 0.5) -> None:
    """Normal parameters everywhere: heads that start at zero would hide what reaches them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def small_learner(space: SequenceSpace, *, seed: int = 0, total_steps: int = 200, **sections: dict) -> GFlowNetLearner:
    """A learner of a toy; `sections`: settings of objective, dynamics, reward and learner."""
    dynamics = {"network": MLPConfig(hidden_size=12, num_layers=1, kmer_sizes=()), "learning_rate": 1e-2}
    learner = {"batch_size": 32, "learning_rate": 1e-2, "warmup_steps": 0, "device": "cpu"}
    return GFlowNetLearner(
        space,
        network=MLPConfig(hidden_size=16, num_layers=2),
        objective=ObjectiveConfig(**({"name": "sgfn_db"} | sections.get("objective", {}))),
        dynamics=DynamicsConfig(**(dynamics | sections.get("dynamics", {}))),
        reward=RewardConfig(**sections.get("reward", {})),
        learner=LearnerConfig(**(learner | sections.get("learner", {}))),
        total_steps=total_steps,
        seed=seed,
    )


# --- toys -------------------------------------------------------------------------------------------------------------


def random_rows(rng: np.random.Generator, allowed: np.ndarray, count: int) -> np.ndarray:
    """`count` laws [count, A] that vanish outside `allowed` [A]."""
    rows = np.where(allowed, rng.exponential(size=(count, len(allowed))) + 0.02, 0.0)
    return rows / rows.sum(1, keepdims=True)


def random_policies(space: SequenceSpace, rng: np.random.Generator) -> Tables:
    return [random_rows(rng, space.allowed[t], space.num_tokens**t) for t in range(space.max_length)]


def random_kernel(space: SequenceSpace, rng: np.random.Generator) -> np.ndarray:
    """A kernel [T, A, A] without any structure; forbidden actions have empty rows."""
    kernel = np.stack([random_rows(rng, allowed, space.num_actions) for allowed in space.allowed])
    return kernel * space.allowed[:, :, None]


def prefix_row(space: SequenceSpace, prefix: Sequence[int]) -> int:
    row = 0
    for token in prefix:
        row = row * space.num_tokens + int(token)
    return row


def draw_paths(space: SequenceSpace, kernel: np.ndarray, count: int, seed: int) -> TrajectoryBatch:
    """Trajectories with uniform intentions, one step at a time; scores uniform in .05..1."""
    rng = np.random.default_rng(seed)
    batch = empty_batch(space.max_length, count)
    for b in range(count):
        for t in range(space.max_length):
            action = rng.choice(np.flatnonzero(space.allowed[t]))
            token = rng.choice(space.num_actions, p=kernel[t, action])
            batch.actions[b, t], batch.tokens[b, t] = action, token
            batch.num_steps[b] += 1
            if space.variable_length and token == space.end:
                break
    batch.scores[:] = rng.uniform(0.05, 1, count)
    return batch


def real_steps(batch: TrajectoryBatch) -> Iterator[tuple[int, int, tuple[int, ...], int, int]]:
    """(trajectory, step, prefix before it, intended, realised) of every step that was taken."""
    for b in range(len(batch)):
        for t in range(int(batch.num_steps[b])):
            prefix = tuple(int(token) for token in batch.tokens[b, :t])
            yield b, t, prefix, int(batch.actions[b, t]), int(batch.tokens[b, t])


def sequence_of(space: SequenceSpace, batch: TrajectoryBatch, b: int) -> tuple[int, ...]:
    """The finished sequence of a trajectory, without end token."""
    return tuple(int(token) for token in batch.tokens[b, : batch.num_steps[b]] if token < space.num_tokens)


def along_batch(space: SequenceSpace, tables: Tables, batch: TrajectoryBatch, padding: float) -> torch.Tensor:
    """float64 [B, T, ...]: the row of each prefix that a step was taken from; `padding` at other steps."""
    values = torch.full((len(batch), space.max_length, *tables[0].shape[1:]), padding, dtype=torch.float64)
    for b, t, prefix, _, _ in real_steps(batch):
        values[b, t] = torch.as_tensor(tables[t][prefix_row(space, prefix)])
    return values


# --- networks ---------------------------------------------------------------------------------------------------------


def one_hot_features(network: PrefixMLP, prefix: Sequence[int]) -> np.ndarray:
    """One block of T·A^k indicators for each k-mer size; indicators of positions beyond the prefix stay zero."""
    actions, blocks = network.num_actions, []
    for k in network.kmer_sizes:
        block = np.zeros((network.num_steps, actions**k))
        for position in range(len(prefix)):
            if position - k + 1 >= 0:
                code = 0
                for token in prefix[position - k + 1 : position + 1]:
                    code = code * actions + int(token)
                block[position, code] = 1
        blocks.append(block.reshape(-1))
    return np.concatenate(blocks)


def mlp_outputs(network: PrefixMLP, prefix: Sequence[int]) -> np.ndarray:
    """float64 [O]: the dense MLP on the flattened, masked one-hot prefix."""
    weights = {name: p.detach().cpu().double().numpy() for name, p in network.named_parameters()}
    x = one_hot_features(network, prefix) @ weights["embedding"] + weights["position_bias"][len(prefix)]
    if "widen.weight" in weights:
        x = weights["widen.weight"] @ x + weights["widen.bias"]
    x = np.maximum(x, 0)
    for layer in range(len(network.hidden)):
        x = x + np.maximum(weights[f"hidden.{layer}.weight"] @ x + weights[f"hidden.{layer}.bias"], 0)
    return weights["head.weight"] @ x + weights["head.bias"]


def softmax(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    weights = np.where(allowed, np.exp(logits - logits[allowed].max()), 0.0)
    return weights / weights.sum()


def policy_at(policy: Policy, prefix: Sequence[int]) -> tuple[np.ndarray, float, np.ndarray]:
    """π(·|s) [A], log F(s) and backward logits of an unfinished prefix; an untrained F counts the completions."""
    space, outputs = policy.space, mlp_outputs(policy.network, prefix)
    completions = sum(
        space.num_tokens ** (length - len(prefix))
        for length in range(len(prefix), space.max_length + 1)
        if length == space.max_length or (space.variable_length and length >= space.min_length)
    )
    actions = space.num_actions
    probabilities = softmax(outputs[:actions], space.allowed[len(prefix)])
    return probabilities, outputs[actions] + np.log(completions), outputs[actions + 1 :]


def dynamics_at(model: DynamicsModel, prefix: Sequence[int]) -> np.ndarray:
    """P̂(x|s,a) [A, A] of an unfinished prefix, intended action first."""
    logits = mlp_outputs(model.network, prefix).reshape(model.space.num_actions, -1)
    return np.stack([softmax(row, model.space.allowed[len(prefix)]) for row in logits])


# --- objectives -------------------------------------------------------------------------------------------------------


def posterior(policy: np.ndarray, outcome: np.ndarray, action: int) -> float:
    """P_B(a|s') by Bayes, from π(·|s) [A] and P(x|s,·) [A] of the realised x."""
    total = sum(policy[b] * outcome[b] for b in range(len(policy)))
    return policy[action] * outcome[action] / total


def learned_backward(logits: np.ndarray, possible: np.ndarray, action: int) -> float:
    """P_B(a|s') of a softmax head over the actions that are `possible` [A]; the taken one always is."""
    return 1 / sum(np.exp(logits[b] - logits[action]) for b in range(len(logits)) if possible[b] or b == action)


def db_loss(
    batch: TrajectoryBatch,
    log_rewards: np.ndarray,
    log_flow: Callable[[tuple[int, ...]], float],
    log_ratio: Callable[[int, int, tuple[int, ...], int, int], float],
) -> float:
    """Mean over real steps of (log F(s) + log P_F/P_B - log F(s'))²; log F of a finished sequence is log R.

    `log_ratio(trajectory, step, prefix, intended, realised)`: log of π for GFN-DB, of π·P̂/P_B for SGFN-DB.
    """
    total, count = 0.0, 0
    for b, t, prefix, action, token in real_steps(batch):
        finished = t + 1 == batch.num_steps[b]
        after = log_rewards[b] if finished else log_flow((*prefix, token))
        total += (log_flow(prefix) + log_ratio(b, t, prefix, action, token) - after) ** 2
        count += 1
    return total / count


def learner_loss(learner: GFlowNetLearner, batch: TrajectoryBatch, log_rewards: np.ndarray) -> float:
    """The loss of a learner's networks on trajectories, every prefix computed anew by the naive MLP."""
    objective, policy, space = learner.objective, learner.policy, learner.space

    def log_ratio(b: int, t: int, prefix: tuple[int, ...], action: int, token: int) -> float:
        probabilities, _, _ = policy_at(policy, prefix)
        if objective.name == "gfn_db":
            return np.log(probabilities[action])
        outcome = dynamics_at(learner.dynamics, prefix)[:, token]
        if objective.backward == "posterior":
            backward = posterior(probabilities, outcome, action)
        else:
            logits = mlp_outputs(policy.network, (*prefix, token))[space.num_actions + 1 :]
            possible = (outcome > objective.backward_support) & space.allowed[t]
            backward = learned_backward(logits, possible, action)
        return np.log(probabilities[action] * outcome[action] / backward)

    return db_loss(batch, log_rewards, lambda prefix: policy_at(policy, prefix)[1], log_ratio)


# --- exact evaluation -------------------------------------------------------------------------------------------------


def brute_force_law(space: SequenceSpace, policies: Tables, kernel: np.ndarray) -> Law:
    """Finished sequence (without end token) -> probability, by walking every path of (intended, realised) pairs."""
    law: Law = {}

    def walk(prefix: tuple[int, ...], probability: float) -> None:
        t = len(prefix)
        if t == space.max_length:
            law[prefix] = law.get(prefix, 0.0) + probability
            return
        for action in range(space.num_actions):
            for token in range(space.num_actions):
                p = probability * policies[t][prefix_row(space, prefix), action] * kernel[t, action, token]
                if p == 0:
                    continue
                if space.variable_length and token == space.end:
                    law[prefix] = law.get(prefix, 0.0) + p
                else:
                    walk((*prefix, token), p)

    walk((), 1.0)
    return law


def em_projection(conditionals: np.ndarray, kernel: np.ndarray, iterations: int) -> np.ndarray:
    """The attainable m = wK closest to each row p [S, A]: mixture weights w by maximum likelihood (EM).

    `kernel` [A, A] may have empty rows, whose weight is zero.
    """
    components = kernel[kernel.sum(1) > 0]
    weights = np.full((len(conditionals), len(components)), 1 / len(components))
    for _ in range(iterations):
        mixture = weights @ components
        ratio = np.divide(conditionals, mixture, out=np.zeros_like(mixture), where=mixture > 0)
        weights = weights * (ratio @ components.T)
        weights /= weights.sum(1, keepdims=True)
    return weights @ components


def assert_water_filling(p: np.ndarray, m: np.ndarray, floor: np.ndarray, tolerance: float = 1e-9) -> None:
    """The conditions that single out argmin KL(p ‖ m) over laws m >= floor: one water level λ for all free tokens."""
    assert abs(m.sum() - 1) < tolerance
    assert (m >= floor - tolerance).all()
    free = m > floor + tolerance
    if not free.any():
        return
    levels = p[free] / m[free]
    level = levels.max()
    assert levels.min() >= level * (1 - 1e-6)  # equal on free tokens
    assert (p[~free] <= (level * (1 + 1e-6) + tolerance) * m[~free] + tolerance).all()  # pinned ones ask for no more


# --- sample metrics ---------------------------------------------------------------------------------------------------


def hamming(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(int(a != b) for a, b in zip(first, second, strict=True))


def modes(tokens: np.ndarray, scores: np.ndarray, cutoff: float, distance: int) -> list[int]:
    """Indices of kept samples, visited in order of falling score, first come first served among equals."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if scores[i] >= cutoff and all(hamming(tokens[i], tokens[j]) > distance for j in kept):
            kept.append(i)
    return kept


def mean_pairwise_hamming(tokens: np.ndarray) -> float:
    distances = [hamming(tokens[i], tokens[j]) for i in range(len(tokens)) for j in range(i)]
    return sum(distances) / len(distances)
