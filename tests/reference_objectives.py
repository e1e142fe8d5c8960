"""Slow references of the objectives: one trajectory at a time, plain probabilities, loops, as the papers write them.

Also the toys they run on: samplers in tables, and the tensors that the package makes of them. Tables over prefixes are as
in `tests.reference`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from actors.trajectories import TrajectoryBatch, empty_batch
from learner import exact
from learner.objectives import balance
from learner.objectives.config import ObjectiveConfig
from learner.objectives.losses import StepLogProbs
from learner.space import SequenceSpace
from tests.reference import (
    Tables,
    along_batch,
    draw_paths,
    learned_backward,
    posterior,
    prefix_row,
    random_kernel,
    random_policies,
    real_steps,
    sequence_of,
)

PADDING = 50.0
"""What fills the steps that must not count."""


class Path(NamedTuple):
    """What one trajectory of n steps shows to an objective: the values at its own states, no padding."""

    flows: np.ndarray
    """[n+1]: F(s_0)..F(s_{n-1}), then R(x)."""
    policy: np.ndarray
    """[n, A]: π(·|s_t)."""
    outcome: np.ndarray
    """[n, A]: P̂(x_t|s_t,·) of the realised x_t."""
    head: np.ndarray
    """[n, A]: backward logits at s_{t+1}."""
    ahead: np.ndarray
    """[n, k, A]: look-ahead logits."""
    actions: np.ndarray
    tokens: np.ndarray
    log_behaviour: np.ndarray
    """[n]: NaN where not known."""

    @property
    def steps(self) -> range:
        return range(len(self.actions))


# --- balance: Bengio et al. 2021, Malkin et al. 2022, Madan et al. 2023, Pan et al. 2023 ------------------------------


def backward_probability(path: Path, t: int, config: ObjectiveConfig) -> float:
    """P_B(a_t|s_{t+1}); 1 without dynamics: a tree."""
    action = path.actions[t]
    if not config.uses_dynamics:
        return 1.0
    if config.name == "sgfn_marginal" or config.backward == "posterior":
        return posterior(path.policy[t], path.outcome[t], action)
    possible = (path.outcome[t] > config.backward_support) & (path.policy[t] > 0)
    return learned_backward(path.head[t], possible, action)


def forward_probability(path: Path, t: int, config: ObjectiveConfig) -> float:
    """π(a_t|s_t) P̂(x_t|s_t,a_t)."""
    action = path.actions[t]
    return path.policy[t, action] * (path.outcome[t, action] if config.uses_dynamics else 1.0)


def db_residual(path: Path, t: int, config: ObjectiveConfig) -> float:
    forward, backward = forward_probability(path, t, config), backward_probability(path, t, config)
    return np.log(path.flows[t] * forward / (path.flows[t + 1] * backward))


def marginal_residual(path: Path, t: int) -> float:
    outcome = sum(path.policy[t, a] * path.outcome[t, a] for a in range(path.policy.shape[1]))
    return np.log(path.flows[t] * outcome / path.flows[t + 1])


def tb_residual(path: Path, config: ObjectiveConfig) -> float:
    """log Z Π π P̂ / (R Π P_B), with Z = F(s_0)."""
    forward = np.prod([forward_probability(path, t, config) for t in path.steps])
    backward = np.prod([backward_probability(path, t, config) for t in path.steps])
    return np.log(path.flows[0] * forward / (path.flows[-1] * backward))


def subtb_loss(residuals: Sequence[float], decay: float) -> float:
    """Of one trajectory: Σ_{i<j} λ^{j-i} (δ_i + .. + δ_{j-1})² / Σ_{i<j} λ^{j-i}, in logarithms."""
    squares, log_weights = [], []
    for i in range(len(residuals)):
        for j in range(i + 1, len(residuals) + 1):
            squares.append(sum(residuals[i:j]) ** 2)
            log_weights.append((j - i) * np.log(decay))
    weights = np.exp(np.asarray(log_weights) - max(log_weights))
    return float(weights @ squares / weights.sum())


def soft_q_loss(paths: Sequence[Path], targets: Sequence[np.ndarray]) -> float:
    """Mean of (V(s) + log π(a|s) - target)²; `targets`: V(s_1)..V(s_n) of each path, of a frozen copy."""
    errors = [
        (np.log(path.flows[t] * path.policy[t, path.actions[t]]) - target[t]) ** 2
        for path, target in zip(paths, targets, strict=True)
        for t in path.steps
    ]
    return float(np.mean(errors))


# --- entropies --------------------------------------------------------------------------------------------------------


def entropy(law: np.ndarray) -> float:
    """In nats."""
    return -sum(p * np.log(p) for p in law if p > 0)


def normalised_entropy(law: np.ndarray) -> float:
    possible = np.count_nonzero(law)
    return entropy(law) / np.log(possible) if possible > 1 else 0.0


def entropy_ratio(entropies: Sequence[float], gamma: float, q: float) -> tuple[float, float, float, float]:
    """H_high, H_low, r_γ and ρ of one trajectory."""
    high, low = np.quantile(entropies, q), np.quantile(entropies, 1 - q)
    ratio = high / (gamma * high + (1 - gamma) * low) if high > 0 else 1.0
    return high, low, ratio, gamma * ratio


def exploration_term(entropy: float, share: float, gamma: float) -> float:
    """H [log ρ + (1-γ)(1-H) log(1-ρ)] of one state, ρ in [1e-3, 1 - 1e-3]."""
    rho = min(max(share, 1e-3), 1 - 1e-3)
    return entropy * (np.log(rho) + (1 - gamma) * (1 - entropy) * np.log(1 - rho))


# --- divergence, look-ahead, reinforcement ----------------------------------------------------------------------------


def posterior_kl(policy: np.ndarray, outcome: np.ndarray) -> float:
    """Σ_a π(a) log π(a)/P_B(a|x) of one state, P_B by Bayes."""
    return sum(
        policy[a] * np.log(policy[a] / posterior(policy, outcome, a)) for a in range(len(policy)) if policy[a] > 0
    )


def log_likelihood_ratio(path: Path, config: ObjectiveConfig) -> float:
    """log P_F(τ) - log P_B(τ|x)R(x)."""
    return tb_residual(path, config) - np.log(path.flows[0])


def importance_weight(path: Path, limit: float) -> float:
    """π(τ)/behaviour(τ) up to `limit`; 0 if the behaviour is not known."""
    weight = 1.0
    for t in path.steps:
        weight *= path.policy[t, path.actions[t]] / np.exp(path.log_behaviour[t])
    return 0.0 if np.isnan(weight) else min(weight, limit)


def flow_kl_surrogate(paths: Sequence[Path], config: ObjectiveConfig) -> float:
    """Mean of w [(ℓ - b) log π(τ) - log P_B(τ|x)], b the weighted mean of ℓ over the other trajectories."""
    weights = [importance_weight(path, config.max_importance_weight) for path in paths]
    ratios, total = [log_likelihood_ratio(path, config) for path in paths], 0.0
    for i, path in enumerate(paths):
        others = [j for j in range(len(paths)) if j != i]
        mass = sum(weights[j] for j in others)
        baseline = sum(weights[j] * ratios[j] for j in others) / mass if mass > 0 else 0.0
        log_pf = sum(np.log(path.policy[t, path.actions[t]]) for t in path.steps)
        log_pb = sum(np.log(backward_probability(path, t, config)) for t in path.steps)
        total += weights[i] * ((ratios[i] - baseline) * log_pf - log_pb)
    return total / len(paths)


def trajectory_kl(paths: Sequence[Path], config: ObjectiveConfig) -> float:
    """Weighted mean of log P_F(τ)Z / P_B(τ|x)R(x), with Z = F(s_0)."""
    weights = [importance_weight(path, config.max_importance_weight) for path in paths]
    return sum(w * tb_residual(path, config) for w, path in zip(weights, paths, strict=True)) / sum(weights)


def lookahead_ce(paths: Sequence[Path], num_ahead: int) -> float:
    """Mean surprise, in nats, of the tokens up to `num_ahead` steps from each prefix that exist."""
    surprises = []
    for path in paths:
        for t in path.steps:
            for k in range(num_ahead):
                if t + k < len(path.tokens):
                    logits = path.ahead[t, k]
                    surprises.append(np.log(np.exp(logits).sum()) - logits[path.tokens[t + k]])
    return float(np.mean(surprises))


def ppo_step(ratio: float, gain: float, clip: float) -> float:
    """min(ρ A, clip(ρ) A) of one step."""
    return min(ratio * gain, min(max(ratio, 1 - clip), 1 + clip) * gain)


def ppo_loss(paths: Sequence[Path], clip: float, entropy_weight: float) -> float:
    """Value error/2, clipped gain and entropy bonus; steps of unknown behaviour add nothing. V(s) = log F(s)."""
    total, count = 0.0, 0
    for path in paths:
        for t in path.steps:
            if np.isnan(path.log_behaviour[t]):
                continue
            count += 1
            gain = path.flows[-1] - np.log(path.flows[t])
            ratio = path.policy[t, path.actions[t]] / np.exp(path.log_behaviour[t])
            total += 0.5 * gain**2 - ppo_step(ratio, gain, clip) - entropy_weight * entropy(path.policy[t])
    return total / count


# --- the loss that `objective` names ----------------------------------------------------------------------------------


def base_loss(paths: Sequence[Path], config: ObjectiveConfig) -> float:
    """Without the weighted terms."""
    every = [(path, t) for path in paths for t in path.steps]
    if config.name == "sgfn_marginal":
        return float(np.mean([marginal_residual(path, t) ** 2 for path, t in every]))
    if config.name == "tb":
        return float(np.mean([tb_residual(path, config) ** 2 for path in paths]))
    if config.name == "subtb":
        residuals = [[db_residual(path, t, config) for t in path.steps] for path in paths]
        return float(np.mean([subtb_loss(each, config.subtb_decay) for each in residuals]))
    if config.name == "soft_q":
        return soft_q_loss(paths, [np.log(path.flows[1:]) for path in paths])
    if config.name == "ppo":
        return ppo_loss(paths, config.ppo_clip, config.ppo_entropy_weight)
    return float(np.mean([db_residual(path, t, config) ** 2 for path, t in every]))


def total_loss(paths: Sequence[Path], config: ObjectiveConfig, kl_weight: float, exploration_weight: float) -> float:
    """With all of them."""
    loss = base_loss(paths, config)
    if kl_weight or exploration_weight:
        entropies = [[normalised_entropy(path.policy[t]) for t in path.steps] for path in paths]
        ratios = [entropy_ratio(each, config.gamma, config.entropy_quantile) for each in entropies]
        if config.kl == "flow":
            kl = flow_kl_surrogate(paths, config)
        else:
            kl = np.mean([posterior_kl(path.policy[t], path.outcome[t]) for path in paths for t in path.steps])
        loss += kl_weight * (kl - np.mean([np.log(ratio[2]) for ratio in ratios]))
        loss += exploration_weight * np.mean(
            [
                exploration_term(h, ratio[3], config.gamma)
                for each, ratio in zip(entropies, ratios, strict=True)
                for h in each
            ]
        )
    if config.lookahead_weight:
        loss += config.lookahead_weight * lookahead_ce(paths, config.lookahead_steps)
    return float(loss)


# --- toys -------------------------------------------------------------------------------------------------------------


class Toy(NamedTuple):
    """A sampler in tables, and trajectories."""

    space: SequenceSpace
    kernel: np.ndarray
    policies: Tables
    flows: Tables
    """log F of every prefix."""
    heads: Tables
    """[V^t, A, A]: backward logits, by realised token."""
    aheads: Tables
    """[V^t, k, A]."""
    batch: TrajectoryBatch
    log_rewards: np.ndarray

    def paths(self) -> list[Path]:
        paths: list[dict[str, list]] = [{name: [] for name in Path._fields} for _ in range(len(self.batch))]
        for b, t, prefix, action, token in real_steps(self.batch):
            row, path = prefix_row(self.space, prefix), paths[b]
            path["flows"].append(np.exp(self.flows[t][row]))
            path["policy"].append(self.policies[t][row])
            path["outcome"].append(self.kernel[t, :, token])
            path["head"].append(self.heads[t][row, token])
            path["ahead"].append(self.aheads[t][row])
            path["actions"].append(action)
            path["tokens"].append(token)
            path["log_behaviour"].append(float(self.batch.log_behaviour[b, t]))
        for b, path in enumerate(paths):
            path["flows"].append(np.exp(self.log_rewards[b]))
        return [Path(**{name: np.asarray(values) for name, values in path.items()}) for path in paths]

    def tensors(self) -> dict[str, Tensor]:
        """What an objective reads, float64, with `PADDING` at the steps that must not count."""
        space, batch = self.space, self.batch
        shape = (len(batch), space.max_length, space.num_actions)
        log_dynamics = torch.full(shape, PADDING, dtype=torch.float64)
        head = torch.full(shape, PADDING, dtype=torch.float64)
        for b, t, prefix, _, token in real_steps(batch):
            log_dynamics[b, t] = torch.from_numpy(self.kernel[t, :, token]).log()
            head[b, t] = torch.as_tensor(self.heads[t][prefix_row(space, prefix), token])
        num_steps = torch.from_numpy(batch.num_steps.astype(np.int64))
        log_reward = torch.from_numpy(self.log_rewards)
        flows = torch.nn.functional.pad(along_batch(space, self.flows, batch, PADDING), (0, 1), value=PADDING)
        with np.errstate(divide="ignore"):
            log_policies = [np.log(policy) for policy in self.policies]
        return {
            "mask": balance.step_mask(num_steps, space.max_length),
            "num_steps": num_steps,
            "tokens": torch.from_numpy(batch.tokens.astype(np.int64)),
            "actions": torch.from_numpy(batch.actions.astype(np.int64)),
            "log_flow": balance.end_flows(flows, log_reward, num_steps),
            "log_policy": along_batch(space, log_policies, batch, PADDING),
            "log_dynamics": log_dynamics,
            "backward_logits": head,
            "lookahead_logits": along_batch(space, self.aheads, batch, PADDING),
            "log_behaviour": torch.from_numpy(batch.log_behaviour.astype(np.float64)),
            "log_reward": log_reward,
        }

    def step(self, config: ObjectiveConfig) -> StepLogProbs:
        return step_of(self.tensors(), config)


def step_of(tensors: dict[str, Tensor], config: ObjectiveConfig) -> StepLogProbs:
    """Those of `tensors` that a learner with this objective would have."""
    absent = {
        "log_dynamics": not config.uses_dynamics,
        "backward_logits": not config.uses_backward_head,
        "lookahead_logits": config.lookahead_weight == 0,
    }
    return StepLogProbs(config=config, **(tensors | {name: None for name, is_absent in absent.items() if is_absent}))


def random_toy(space: SequenceSpace, kernel: np.ndarray | None = None, *, count: int = 30, ahead: int = 3) -> Toy:
    """Nothing fits anything; behaviour log-probs are a bit off the policy's, those of every fifth trajectory unknown."""
    rng = np.random.default_rng(5)
    kernel, policies = random_kernel(space, rng) if kernel is None else kernel, random_policies(space, rng)
    flows = [rng.normal(size=space.num_tokens**t) for t in range(space.max_length)]
    batch = draw_paths(space, kernel, count, seed=11)
    for b, t, prefix, action, _ in real_steps(batch):
        chosen = np.log(policies[t][prefix_row(space, prefix), action])
        batch.log_behaviour[b, t] = np.nan if b % 5 == 4 else chosen + rng.normal(scale=0.3)
    return Toy(
        space, kernel, policies, flows, *random_heads(space, rng, ahead), batch, np.log(batch.scores.astype(float))
    )


def perfect_toy(space: SequenceSpace, kernel: np.ndarray, *, log_z: float = 1.7) -> Toy:
    """Rewards in proportion to a sampler's law, hence attainable, and the flows and posterior of that target."""
    rng = np.random.default_rng(6)
    policies = random_policies(space, rng)
    law, _ = exact.realised_law(space, policies, kernel)
    tree = exact.target_tree(space, np.log(law) + log_z)
    tokens, lengths = space.enumerate()
    rewards = {tuple(row[:n].tolist()): np.log(p) + log_z for row, n, p in zip(tokens, lengths, law, strict=True)}
    batch = draw_paths(space, kernel, 40, seed=12)
    log_rewards = np.asarray([rewards[sequence_of(space, batch, b)] for b in range(len(batch))])
    for b, t, prefix, action, _ in real_steps(batch):
        batch.log_behaviour[b, t] = np.log(policies[t][prefix_row(space, prefix), action])
    heads, aheads = random_heads(space, rng, 3)
    for t, head in enumerate(heads):
        joint = policies[t][:, :, None] * kernel[t]  # [V^t, intended, realised]
        head[:] = np.log(np.maximum(joint, 1e-300)).transpose(0, 2, 1)
    flows = [np.log(reach) + tree.log_z for reach in tree.reach]
    return Toy(space, kernel, policies, flows, heads, aheads, batch, log_rewards)


def random_heads(space: SequenceSpace, rng: np.random.Generator, ahead: int) -> tuple[Tables, Tables]:
    actions, sizes = space.num_actions, [space.num_tokens**t for t in range(space.max_length)]
    return (
        [rng.normal(size=(size, actions, actions)) for size in sizes],
        [rng.normal(size=(size, ahead, actions)) for size in sizes],
    )


def every_path(space: SequenceSpace, kernel: np.ndarray) -> TrajectoryBatch:
    """All trajectories (intended and realised) that are possible; scores are a fixed function of the sequence."""
    found: list[list[tuple[int, int]]] = []

    def walk(path: list[tuple[int, int]]) -> None:
        if len(path) == space.max_length or (path and space.variable_length and path[-1][1] == space.end):
            found.append(path)
            return
        for action, token in zip(*np.nonzero(kernel[len(path)]), strict=True):
            walk([*path, (int(action), int(token))])

    walk([])
    batch = empty_batch(space.max_length, len(found))
    for b, path in enumerate(found):
        batch.num_steps[b] = len(path)
        batch.actions[b, : len(path)], batch.tokens[b, : len(path)] = zip(*path, strict=True)
        batch.scores[b] = 0.2 + 0.7 * abs(np.sin(1 + prefix_row(space, [token for _, token in path]) + 7 * len(path)))
    return batch
