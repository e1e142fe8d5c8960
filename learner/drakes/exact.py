"""Exact laws, likelihoods and path KL of denoisers of short sequences, by dynamic programming over all masked states.

Without time in the network and with N -> infinity, positions are revealed one at a time in uniformly random order, so a
state is reached with a probability that follows from the states with one mask more: 390,625 states for DNA 8-mers.

Shapes: V tokens, L positions, S = (V+1)^L states and n = V^L sequences, both in lexicographic order (the first position
is the most significant, the mask is digit V). Units: nats a sequence.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from learner.drakes.denoiser import TokenModel, encode, symmetrised
from learner.drakes.reverse_complement import reverse_complement_tokens
from learner.drakes.schedule import LOG_LINEAR, MaskingSchedule
from learner.strands import NUM_BASES

CHUNK = 16_384
"""States evaluated at once."""
MAX_STATES = 5_000_000


def all_strings(num_symbols: int, length: int) -> Tensor:
    """int64 [num_symbols^L, L] in lexicographic order; ValueError above five million."""
    if num_symbols**length > MAX_STATES:
        raise ValueError(f"{num_symbols}^{length} states are too many to enumerate: at most {MAX_STATES:,} are allowed")
    return torch.arange(num_symbols**length)[:, None] // strides(num_symbols, length) % num_symbols


def strides(num_symbols: int, length: int) -> Tensor:
    """int64 [L]: place values, so that `tokens @ strides` is the row of `tokens`."""
    return num_symbols ** torch.arange(length - 1, -1, -1)


def log_prob_table(model: TokenModel, *, symmetric: bool = False) -> Tensor:
    """float [S, L, V]: log p(token | state) at every state; with `symmetric`, of p_sym (DNA only), at no extra cost.

    Carries gradients where they are enabled. States without a mask stay 0, as nothing reads them.
    """
    states = all_strings(model.num_tokens + 1, model.length)
    masked = (states == model.num_tokens).any(1).nonzero().squeeze(1)
    parts = [model.log_probs(encode(states[rows], model.num_tokens, _dtype(model))) for rows in masked.split(CHUNK)]
    values = torch.cat(parts)
    table = values.new_zeros(len(states), *values.shape[1:]).index_copy(0, masked, values)
    return of_both_strands(table) if symmetric else table


def of_both_strands(table: Tensor) -> Tensor:
    """The `log_prob_table` [S, L, 4] of p_sym from that of p (DNA only)."""
    states = all_strings(NUM_BASES + 1, table.shape[1])
    return symmetrised(table, table[reverse_complement_tokens(states) @ strides(NUM_BASES + 1, table.shape[1])])


def _dtype(model: TokenModel) -> torch.dtype:
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return torch.float32 if parameter is None else parameter.dtype


class _Level(NamedTuple):
    """All pairs of a state with j masks and one of its masked positions."""

    num_masked: int
    states: Tensor
    """int64 [P]."""
    positions: Tensor
    """int64 [P]."""
    children: Tensor
    """int64 [P, V]: the state with each token revealed there."""


def _levels(num_tokens: int, length: int) -> list[_Level]:
    """From all masked to one mask."""
    states, places = all_strings(num_tokens + 1, length), strides(num_tokens + 1, length)
    num_masked, levels = (states == num_tokens).sum(1), []
    for level in range(length, 0, -1):
        rows = (num_masked == level).nonzero().squeeze(1)
        at, positions = (states[rows] == num_tokens).nonzero(as_tuple=True)
        parents = rows[at]
        children = parents[:, None] + (torch.arange(num_tokens) - num_tokens) * places[positions, None]
        levels.append(_Level(level, parents, positions, children))
    return levels


def reach(table: Tensor) -> Tensor:
    """float64 [S]: the probability that a trajectory of random order passes each state, from `log_prob_table` [S, L, V].

    π(y) of a state with j masks is Σ over its visible i of π(y with i masked) p(y^i | y with i masked)/(j+1). Each level
    sums to one. Differentiable.
    """
    num_tokens, length = table.shape[2], table.shape[1]
    probability = torch.zeros(len(table), dtype=torch.float64)
    probability[-1] = 1
    for level in _levels(num_tokens, length):
        tokens = table[level.states, level.positions].double().exp()
        flow = probability[level.states, None] * tokens / level.num_masked
        probability = probability.index_add(0, level.children.flatten(), flow.flatten())
    return probability


def finished(values: Tensor, num_tokens: int, length: int) -> Tensor:
    """[n]: the entries of `values` [S] at states without a mask, the sequences in lexicographic order."""
    return values[all_strings(num_tokens, length) @ strides(num_tokens + 1, length)]


def any_order_law(table: Tensor) -> Tensor:
    """float64 [n]: p_θ(x_0) of every sequence, from `log_prob_table` [S, L, V]. Differentiable."""
    return finished(reach(table), table.shape[2], table.shape[1])


def path_kl(table: Tensor, pretrained: Tensor) -> Tensor:
    """float64 []: KL of θ's trajectories to the pretrained ones (2410.13643, eq. 3), N -> infinity, from two tables.

    Σ_y π_θ(y) (1/j) Σ over the j masked i of KL(p_θ^i(·|y) ‖ p_pre^i(·|y)). Differentiable.
    """
    probability, total = reach(table), torch.zeros((), dtype=torch.float64)
    for level in _levels(table.shape[2], table.shape[1]):
        ours = table[level.states, level.positions].double()
        divergence = (ours.exp() * (ours - pretrained[level.states, level.positions].double())).sum(-1)
        total = total + (probability[level.states] * divergence).sum() / level.num_masked
    return total


def nelbo_of_all(table: Tensor) -> Tensor:
    """float64 [n]: the exact NELBO of every sequence, as `diffusion.exact_nelbo` has it, from `log_prob_table`."""
    length, num_tokens = table.shape[1], table.shape[2]
    tokens, places = all_strings(num_tokens, length), strides(num_tokens + 1, length)
    flat, total = table.flatten(), torch.zeros(len(tokens), dtype=torch.float64)
    rows = tokens @ places
    for size in range(1, length + 1):
        for subset in itertools.combinations(range(length), size):
            held = list(subset)
            state = rows + ((num_tokens - tokens[:, held]) * places[held]).sum(1)
            entries = (state[:, None] * length + torch.tensor(held)) * num_tokens + tokens[:, held]
            total -= flat[entries].double().sum(1) / (size * math.comb(length, size))
    return total


def finite_step_law(
    table: Tensor, pretrained: Tensor, num_steps: int, schedule: MaskingSchedule = LOG_LINEAR
) -> tuple[Tensor, Tensor]:
    """Law float64 [n] and path KL float64 [] of the sampler with N steps; 9^L pairs of states for DNA, so L <= 6.

    In a step with unmask probability u, a subset U of the masked set S is revealed with probability
    u^|U| (1-u)^(|S|-|U|) times the product of its tokens' probabilities. ValueError if there are too many pairs.
    """
    length, num_tokens = table.shape[1], table.shape[2]
    digits, places = all_strings(2 * num_tokens + 1, length), strides(num_tokens + 1, length)
    before, after = digits.clamp(max=num_tokens), torch.where(digits > num_tokens, digits - num_tokens - 1, digits)
    source, target = before @ places, after @ places
    revealed = digits > num_tokens
    values = table[source].double().gather(-1, after.clamp(max=num_tokens - 1)[..., None]).squeeze(-1)
    tokens = (values * revealed).sum(1).exp()
    num_revealed, num_kept = revealed.sum(1), (digits == num_tokens).sum(1)
    masked = all_strings(num_tokens + 1, length) == num_tokens
    divergence = (table.double().exp() * (table.double() - pretrained.double())).sum(-1)
    divergence = (divergence * masked).sum(-1)
    law, total = torch.zeros(len(table), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    law[-1] = 1
    for u in schedule.unmask_probs(num_steps).flip(0):
        total = total + u * (law * divergence).sum()
        flow = law[source] * tokens * u**num_revealed * (1 - u) ** num_kept
        law = torch.zeros_like(law).index_add(0, target, flow)
    return finished(law, num_tokens, length), total


def optimum(pretrained_law: np.ndarray, rewards: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    """The law p* ∝ p_pre exp(R/alpha) [n] that maximises E[R] - alpha · KL_path, and its value.

    J* = alpha log E_pre exp(R/alpha), from `pretrained_law` and `rewards` R of every sequence, float [n].
    `alpha` in units of reward a nat; ValueError unless it is positive. J* - J(θ) is alpha times the KL of θ's paths to
    the optimum's.
    """
    if alpha <= 0:
        raise ValueError(f"alpha {alpha} must be positive")
    top = rewards.max()
    tilted = pretrained_law * np.exp((rewards - top) / alpha)
    return tilted / tilted.sum(), float(alpha * np.log(tilted.sum()) + top)


class FrontierPoint(NamedTuple):
    """The best that a path KL can buy."""

    alpha: float
    reward: float
    """E[R]."""
    path_kl: float
    """Nats."""


def frontier(pretrained_law: np.ndarray, rewards: np.ndarray, alphas: np.ndarray) -> list[FrontierPoint]:
    """The largest E[R] at each path KL: the exponential tilts of p_pre, one for each of `alphas`."""
    points = []
    for alpha in alphas:
        law, value = optimum(pretrained_law, rewards, float(alpha))
        mean = float(law @ rewards)
        points.append(FrontierPoint(float(alpha), mean, (mean - value) / float(alpha)))
    return points


def best_reward(pretrained_law: np.ndarray, rewards: np.ndarray, kl: float) -> float:
    """The largest E[R] of any sampler whose path KL is at most `kl` nats, by bisection over the tilts."""
    low, high = 1e-4 * float(np.ptp(rewards) or 1), 1e4 * float(np.ptp(rewards) or 1)
    for _ in range(100):
        middle = math.sqrt(low * high)
        point = frontier(pretrained_law, rewards, np.array([middle]))[0]
        low, high = (middle, high) if point.path_kl > kl else (low, middle)
    return frontier(pretrained_law, rewards, np.array([high]))[0].reward
