"""Slow references for masked diffusion: loops over orders, subsets and single states, as the papers write them.

The toy denoisers here are random: a table of one law a state and position, or a small network with large weights.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from learner.drakes.denoiser import Denoiser, DenoiserConfig, encode
from tests.reference import randomise

State = tuple[int, ...]
Law = dict[State, float]
Conditional = Callable[[State], np.ndarray]
"""A state to probabilities [L, V]."""


def toy_denoiser(length: int = 4, *, num_tokens: int = 4, seed: int = 0, scale: float = 0.35, **config) -> Denoiser:
    model = Denoiser(num_tokens, length, DenoiserConfig(**({"hidden_size": 16, "num_layers": 1} | config)))
    randomise(model, seed, scale)
    return model


class RandomTable(nn.Module):
    """An independent random law at every state and position, float64 parameters [(V+1)^L, L, V]."""

    def __init__(self, num_tokens: int, length: int, seed: int = 0):
        super().__init__()
        self.num_tokens, self.length = num_tokens, length
        generator = torch.Generator().manual_seed(seed)
        shape = ((num_tokens + 1) ** length, length, num_tokens)
        self.logits = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    def log_probs(self, states: Tensor) -> Tensor:
        places = (self.num_tokens + 1) ** torch.arange(self.length - 1, -1, -1)
        return self.logits[states.argmax(-1) @ places].log_softmax(-1)


@torch.no_grad()
def conditional_of(model) -> Conditional:
    def law(state: State) -> np.ndarray:
        with torch.no_grad():
            return model.log_probs(encode(torch.tensor([state]), model.num_tokens))[0].double().exp().numpy()

    return law


def sequences(num_tokens: int, length: int) -> Iterator[State]:
    return itertools.product(range(num_tokens), repeat=length)


def without(x: State, masked: tuple[int, ...], mask: int) -> State:
    return tuple(mask if i in masked else v for i, v in enumerate(x))


def any_order_law(p: Conditional, num_tokens: int, length: int) -> Law:
    """p(x) as the mean over all L! orders of the product of conditionals."""
    law = {}
    for x in sequences(num_tokens, length):
        total = 0.0
        for order in itertools.permutations(range(length)):
            product = 1.0
            for j, i in enumerate(order):
                product *= p(without(x, order[j:], num_tokens))[i, x[i]]
            total += product
        law[x] = total / math.factorial(length)
    return law


def nelbo(p: Conditional, x: State, num_tokens: int) -> float:
    """Mean over orders of -Σ log p: the NELBO of random-order autoregression, without binomials."""
    length, total = len(x), 0.0
    for order in itertools.permutations(range(length)):
        for j, i in enumerate(order):
            total -= math.log(p(without(x, order[j:], num_tokens))[i, x[i]])
    return total / math.factorial(length)


def any_order_path_kl(p: Conditional, q: Conditional, num_tokens: int, length: int) -> float:
    """Mean over orders of the sum of KLs at the revealed positions, walking all token strings of each order."""
    total = 0.0
    for order in itertools.permutations(range(length)):
        layer = {(num_tokens,) * length: 1.0}
        for i in order:
            following: Law = {}
            for state, mass in layer.items():
                ours, theirs = p(state)[i], q(state)[i]
                total += mass * sum(a * math.log(a / b) for a, b in zip(ours, theirs, strict=True))
                for v in range(num_tokens):
                    child = (*state[:i], v, *state[i + 1 :])
                    following[child] = following.get(child, 0.0) + mass * ours[v]
            layer = following
    return total / math.factorial(length)


def finite_step_law(p: Conditional, num_tokens: int, length: int, unmask_probs: list[float]) -> Law:
    """The sampler's law, walking every outcome of every step; `unmask_probs` in the order of the steps."""
    layer = {(num_tokens,) * length: 1.0}
    for u in unmask_probs:
        following: Law = {}
        for state, mass in layer.items():
            law = p(state)
            choices = []
            for i, symbol in enumerate(state):
                if symbol != num_tokens:
                    choices.append([(symbol, 1.0)])
                else:
                    choices.append([(v, u * law[i, v]) for v in range(num_tokens)] + [(num_tokens, 1 - u)])
            for outcome in itertools.product(*choices):
                weight = mass * math.prod(w for _, w in outcome)
                if weight:
                    child = tuple(s for s, _ in outcome)
                    following[child] = following.get(child, 0.0) + weight
        layer = following
    return layer


def finite_step_path_kl(p: Conditional, q: Conditional, num_tokens: int, length: int, num_steps: int) -> float:
    """Σ over steps k = N..1 of E[(1/k) Σ over masked i of KL(p^i ‖ q^i)], log-linear schedule."""
    total = 0.0
    for k in range(num_steps, 0, -1):
        reached = finite_step_law(p, num_tokens, length, [1 / j for j in range(num_steps, k, -1)])
        for state, mass in reached.items():
            ours, theirs = p(state), q(state)
            divergence = sum(
                float((ours[i] * np.log(ours[i] / theirs[i])).sum()) for i in range(length) if state[i] == num_tokens
            )
            total += mass * divergence / k
    return total


def top_k(logits: list[float], k: int) -> list[float]:
    bar = sorted(logits, reverse=True)[k - 1]
    return [v if v >= bar else -math.inf for v in logits]


def top_p(probs: list[float], p: float) -> list[bool]:
    """Kept or not: the mass of the tokens strictly before it in descending order is below p."""
    order, before, kept = sorted(range(len(probs)), key=lambda v: -probs[v]), 0.0, [False] * len(probs)
    for v in order:
        kept[v] = before < p
        before += probs[v]
    return kept


def histogram(tokens: Tensor, num_tokens: int) -> np.ndarray:
    places = num_tokens ** np.arange(tokens.shape[1] - 1, -1, -1)
    return np.bincount(tokens.numpy() @ places, minlength=num_tokens ** tokens.shape[1])


def chi_square(counts: np.ndarray, law: np.ndarray) -> float:
    expected = law / law.sum() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())
