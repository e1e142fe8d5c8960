"""Forward masking, its posterior, and the NELBO of a denoiser (MDLM, arXiv 2406.07524).

Shapes: B batch, L positions, V tokens (the mask is token V). Tokens are int64; likelihoods are in nats a sequence.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from learner.drakes.denoiser import TokenModel, encode
from learner.drakes.schedule import LOG_LINEAR, MaskingSchedule

Estimator = Literal["count", "harmonic", "time"]


def mask_at(
    tokens: Tensor, t: Tensor, mask: int, schedule: MaskingSchedule, generator: torch.Generator | None = None
) -> Tensor:
    """A draw of x_t [B, L] given x_0 = `tokens` [B, L]: each token becomes `mask` with probability m(t), t float [B]."""
    uniform = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    return torch.where(uniform < schedule.mask_prob(t)[:, None], mask, tokens)


def posterior(noisy: Tensor, clean: Tensor, t: Tensor, s: Tensor, num_tokens: int, schedule: MaskingSchedule) -> Tensor:
    """Laws [B, L, V+1] of x_s given x_t = `noisy` [B, L] and x_0 = `clean` [B, L], for times s < t, float [B].

    A visible token stays; a masked one is x_0 with probability (m(t) - m(s))/m(t), or else still masked.
    """
    revealed = schedule.unmask_prob(t, s)[:, None, None]
    visible = encode(noisy, num_tokens)
    return torch.where(
        noisy[..., None] == num_tokens, revealed * encode(clean, num_tokens) + (1 - revealed) * visible, visible
    )


def cross_entropy(model: TokenModel, tokens: Tensor, masked: Tensor) -> Tensor:
    """float [B]: Σ over the positions `masked` bool [B, L] of -log p(x_0^i | `tokens` [B, L] without them)."""
    states = encode(torch.where(masked, model.num_tokens, tokens), model.num_tokens)
    log_probs = model.log_probs(states).gather(-1, tokens[..., None]).squeeze(-1)
    return -(log_probs * masked).sum(-1)


def nelbo_count(model: TokenModel, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float [B]: unbiased draws of the NELBO of `tokens` [B, L] from k masked positions, k uniform on 1..L.

    (L/k) times the cross-entropy of a uniform subset of size k. k is stratified over the batch in random order.
    """
    batch, length = tokens.shape
    count = 1 + (_strata(batch, generator, tokens.device) * length).long().clamp(max=length - 1)
    return length / count * cross_entropy(model, tokens, _subsets(count, length, generator))


def nelbo_harmonic(model: TokenModel, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float [B]: as `nelbo_count` with P(k) ∝ 1/k, so that every masked token weighs H_L = Σ 1/k.

    Its value scatters more, its gradient less: no token outweighs others, and where one mask is left, which is where
    a model has the most to learn, it looks most often. Unbiased as well.
    """
    batch, length = tokens.shape
    shares = 1 / torch.arange(1, length + 1, dtype=torch.float64, device=tokens.device)
    weight = float(shares.sum())
    upper = shares.cumsum(0)[:-1] / weight
    count = 1 + torch.searchsorted(upper, _strata(batch, generator, tokens.device), right=True)
    return weight * cross_entropy(model, tokens, _subsets(count, length, generator))


def nelbo_time(
    model: TokenModel,
    tokens: Tensor,
    generator: torch.Generator | None = None,
    *,
    schedule: MaskingSchedule = LOG_LINEAR,
    t_min: float = 1e-3,
) -> Tensor:
    """float [B]: draws of the NELBO of `tokens` [B, L] from t uniform on (t_min, 1]; their bias is O(t_min).

    m'(t)/m(t) times the cross-entropy of the tokens masked at t. The strata of t are in random order, because rows that
    are sorted would else meet times that are.
    """
    t = 1 - (1 - t_min) * _strata(len(tokens), generator, tokens.device)
    noisy = mask_at(tokens, t, model.num_tokens, schedule, generator)
    entropy = cross_entropy(model, tokens, noisy == model.num_tokens)
    return (1 - t_min) * schedule.weight(t).to(entropy.dtype) * entropy


ESTIMATORS = {"count": nelbo_count, "harmonic": nelbo_harmonic, "time": nelbo_time}


def nelbo(
    model: TokenModel, tokens: Tensor, generator: torch.Generator | None = None, *, estimator: Estimator = "count"
) -> Tensor:
    """float [B]: one draw a sequence of the NELBO of `tokens` [B, L] by the named estimator."""
    return ESTIMATORS[estimator](model, tokens, generator)


def exact_nelbo(model: TokenModel, tokens: Tensor) -> Tensor:
    """float64 [B]: the NELBO of `tokens` [B, L] as the sum over all 2^L - 1 sets S of masked positions.

    Σ_S 1/(|S| C(L, |S|)) Σ_{i in S} -log p(x_0^i | x_0 with S masked), which is both estimators' mean, since
    ∫ t^(k-1) (1-t)^(L-k) dt = 1/(k C(L, k)).
    """
    length = tokens.shape[1]
    total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    bits = torch.arange(length, device=tokens.device)
    for subset in range(1, 2**length):
        masked, size = (subset >> bits & 1).bool(), subset.bit_count()
        total += cross_entropy(model, tokens, masked.expand_as(tokens)).double() / (size * math.comb(length, size))
    return total


def _strata(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """float64 [count] in [0, 1), one in each of `count` equal intervals, in random order."""
    order = torch.randperm(count, generator=generator, device=device)
    return (order + torch.rand(count, generator=generator, device=device, dtype=torch.float64)) / count


def _subsets(count: Tensor, length: int, generator: torch.Generator | None) -> Tensor:
    """bool [B, L]: a uniform subset of the positions of size `count` [B] a row."""
    order = torch.rand(len(count), length, generator=generator, device=count.device).argsort(1).argsort(1)
    return order < count[:, None]
