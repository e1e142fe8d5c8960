"""The exact law of a sampler on an enumerable space, and its distance to the target.

Every finished sequence is a leaf of the tree of prefixes. With the policy π(a|s) and the environment's true kernel
K_t(x|a), the law is p(x) = Π_t Σ_a π(a|s_t) K_t(x_t|a). Shapes: V tokens, A actions, T steps, n finished sequences
(shorter first, then in lexicographic order, as `SequenceSpace.enumerate` lists them).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.dynamics import DynamicsModel
from learner.networks.context import Context
from learner.networks.prefixes import PrefixState
from learner.policy import Policy
from learner.space import SequenceSpace

CHUNK = 16_384
"""Prefixes evaluated at once."""


@dataclass(frozen=True, kw_only=True)
class TargetTree:
    """The target p*(x) = R(x)/Z as a law of finished sequences and as conditionals of every prefix."""

    law: np.ndarray
    """float64 [n]: p*(x)."""
    log_z: float
    """log Σ R(x)."""
    conditionals: list[np.ndarray]
    """T arrays float64 [V^t, A]: p*(next token | prefix of length t); rows of unreachable prefixes are zero."""
    reach: list[np.ndarray]
    """T arrays float64 [V^t]: p*(prefix)."""


def target_tree(space: SequenceSpace, log_rewards: np.ndarray) -> TargetTree:
    """The target from log R float [n] of every finished sequence; minus infinity stands for an impossible one."""
    log_rewards = np.asarray(log_rewards, dtype=np.float64)
    top = log_rewards.max()
    masses = np.exp(log_rewards - top)
    total = masses.sum()
    by_length = _split_lengths(space, masses / total)
    conditionals: list[np.ndarray] = []
    reach: list[np.ndarray] = []
    below = by_length[space.max_length]
    for length in range(space.max_length - 1, -1, -1):
        children = below.reshape(-1, space.num_tokens)
        if space.variable_length:
            ended = by_length.get(length, np.zeros(len(children)))
            children = np.concatenate([children, ended[:, None]], 1)
        below = children.sum(1)
        reach.insert(0, below)
        conditionals.insert(0, children / np.where(below > 0, below, 1)[:, None])
    return TargetTree(law=masses / total, log_z=float(np.log(total) + top), conditionals=conditionals, reach=reach)


def _split_lengths(space: SequenceSpace, values: np.ndarray) -> dict[int, np.ndarray]:
    """Views of `values` [n] for each length of finished sequences."""
    parts, start = {}, 0
    first = space.min_length if space.variable_length else space.max_length
    for length in range(first, space.max_length + 1):
        parts[length] = values[start : start + space.num_tokens**length]
        start += space.num_tokens**length
    assert start == len(values)
    return parts


@torch.no_grad()
def _tables(
    network: Policy | DynamicsModel, evaluate: Callable[[PrefixState], Tensor], context: Context | None = None
) -> list[np.ndarray]:
    """`evaluate` at all V^t prefixes of each length t = 0..T-1, lexicographic, float64.

    Goes down the tree depth first in blocks of `CHUNK` prefixes, so that only one block a depth is in memory.
    """
    space, tables = network.space, [np.empty(0)] * network.space.max_length

    def fill(state: PrefixState, start: int) -> None:
        values, depth = evaluate(state).double().cpu().numpy(), state.depth
        if not len(tables[depth]):
            tables[depth] = np.empty((space.num_tokens**depth, *values.shape[1:]))
        tables[depth][start : start + len(values)] = values
        if depth + 1 == space.max_length:
            return
        size = max(1, CHUNK // space.num_tokens)
        for first in range(0, len(values), size):
            block = state.select(slice(first, first + size))
            parents = torch.arange(len(block), device=state.device).repeat_interleave(space.num_tokens)
            tokens = torch.arange(space.num_tokens, device=state.device).repeat(len(block))
            fill(network.extend(block, parents, tokens), (start + first) * space.num_tokens)

    fill(network.start(context), 0)
    return tables


def policy_tables(policy: Policy, context: Context | None = None) -> list[np.ndarray]:
    """T arrays float64 [V^t, A]: π(a|s) of every prefix, of those that continue the one window of a `context`.

    Raises ValueError for a policy that reads its own intentions: a prefix of realised tokens does not determine it.
    """
    if policy.thought_context:
        raise ValueError("a policy with a thought context has no table over prefixes of realised tokens")
    return _tables(policy, lambda state: policy.at(state).log_policy.exp(), context)


def realised_law(
    space: SequenceSpace, policies: list[np.ndarray], kernel: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The law of finished sequences, float64 [n], and the reach of every prefix, T arrays float64 [V^t].

    `policies`: as `policy_tables` gives them; `kernel` float [T, A, A]: K_t(x|a), intended action first.
    """
    ended: list[np.ndarray] = []
    reach, current = [], np.ones(1)
    for length in range(space.max_length):
        reach.append(current)
        outcome = current[:, None] * (policies[length] @ np.asarray(kernel[length], dtype=np.float64))
        if space.variable_length and length >= space.min_length:
            ended.append(outcome[:, space.end])
        current = outcome[:, : space.num_tokens].reshape(-1)
    return np.concatenate([*ended, current]), reach


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """TV(p, q) = ½ Σ |p - q| of two laws [n]."""
    return float(0.5 * np.abs(p - q).sum())


def kl_divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p ‖ q) in nats of two laws [n]; infinite where q misses mass of p."""
    held = p > 0
    with np.errstate(divide="ignore"):
        return float((p[held] * (np.log(p[held]) - np.log(q[held]))).sum())


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen–Shannon divergence in nats, in [0, log 2]."""
    middle = 0.5 * (p + q)
    return 0.5 * kl_divergence(p, middle) + 0.5 * kl_divergence(q, middle)


def attainable_projection(conditionals: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Water-filling: argmin_m KL(p ‖ m) over laws m with m >= floor, for each row p of `conditionals` [S, A].

    `floor` float [A], summing to at most 1. The minimiser is m = max(floor, p/λ) with the λ that makes it sum to one;
    tokens are pinned to their floor in rising order of p/floor. A row of zeros (a prefix that the target never reaches)
    counts as uniform.
    """
    p, floor = np.asarray(conditionals, dtype=np.float64), np.asarray(floor, dtype=np.float64)
    p = np.where(p.sum(1, keepdims=True) > 0, p, 1 / p.shape[1])
    if floor.sum() >= 1 - 1e-12:
        return np.broadcast_to(floor / floor.sum(), p.shape).copy()
    ratio = np.where(floor > 0, p / np.where(floor > 0, floor, 1), np.inf)
    order = np.argsort(ratio, axis=1)
    sorted_p = np.take_along_axis(p, order, 1)
    sorted_floor = floor[order]
    pinned_floor = np.cumsum(sorted_floor, 1) - sorted_floor  # mass pinned if the tokens before this one are
    free_p = sorted_p[:, ::-1].cumsum(1)[:, ::-1]  # target mass from this token on
    scale = free_p / np.maximum(1 - pinned_floor, 1e-300)  # λ if exactly the tokens before this one are pinned
    feasible = (sorted_p >= sorted_floor * scale * (1 - 1e-12)) & (free_p > 0)
    first = feasible.argmax(1)
    scale = np.take_along_axis(scale, first[:, None], 1)
    free = np.arange(p.shape[1]) >= first[:, None]
    projected = np.where(free, sorted_p / np.where(scale > 0, scale, 1), sorted_floor)
    result = np.empty_like(projected)
    np.put_along_axis(result, order, projected, 1)
    return result


def replacement_floor(kernel: np.ndarray) -> np.ndarray:
    """float64 [T, A]: the least probability of each outcome, whatever the policy, under a kernel [T, A, A].

    Raises ValueError if the kernel is not "keep the intention, or else replace it from a fixed law", for which alone
    the attainable conditionals are exactly those above this floor.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    possible = kernel.sum(-1, keepdims=True) > 0  # a forbidden action has an empty row
    floor = np.where(possible, kernel, np.inf).min(axis=1)
    kept = (1 - floor.sum(-1))[:, None, None] * np.eye(kernel.shape[-1])
    if not np.allclose(kernel, np.where(possible, kept + floor[:, None, :], 0), atol=1e-9):
        raise ValueError("the attainable floor is known only for noise that replaces the intended token by a fixed law")
    return floor


def kl_floor(space: SequenceSpace, target: TargetTree, floor: np.ndarray) -> tuple[float, float]:
    """The least attainable KL(p* ‖ p_θ) in nats under noise with outcome floor [T, A], and the TV of that best law."""
    total, projections = 0.0, []
    for length in range(space.max_length):
        conditionals = target.conditionals[length]
        best = attainable_projection(conditionals, floor[length])
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(conditionals > 0, conditionals * np.log(conditionals / best), 0.0)
        total += float((target.reach[length] * terms.sum(1)).sum())
        projections.append(best)
    identity = np.broadcast_to(np.eye(space.num_actions), (space.max_length, space.num_actions, space.num_actions))
    law, _ = realised_law(space, projections, identity)
    return total, total_variation(target.law, law)


def dynamics_error(model: DynamicsModel, kernel: np.ndarray, reach: list[np.ndarray]) -> float:
    """Mean TV between P̂(·|s,a) and K_t(·|a) over allowed actions, steps, and prefixes weighted by `reach`."""
    space, errors = model.space, []
    for length, table in enumerate(_tables(model, lambda state: model.at(state).exp())):
        distances = 0.5 * np.abs(table - kernel[length]).sum(-1)[:, space.allowed[length]].mean(-1)
        errors.append((distances * reach[length]).sum() / reach[length].sum())
    return float(np.mean(errors))
