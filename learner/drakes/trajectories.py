"""Log-probabilities of given trajectories of masked diffusion: tokens, and the steps that revealed them.

Shapes: B sequences, L positions, V tokens (the mask is token V).
"""

import torch
from torch import Tensor

from learner.drakes.denoiser import TokenModel, encode
from learner.drakes.sampling import plan_rounds

CHUNK = 12_800
"""Positions that pass through the model at once: their activations stay in the cache, which is a quarter faster."""


def trajectory_log_probs(model: TokenModel, tokens: Tensor, reveal_steps: Tensor, num_steps: int) -> Tensor:
    """float [B, L]: log p of each token when it was revealed, differentiable in the model; 0 where it was given.

    `tokens` int64 [B, L]; `reveal_steps` int [B, L], see `sampling.Samples`. Their sum is log p of the trajectory but for
    the reveal events, which do not depend on the model.
    """
    plan = plan_rounds(reveal_steps.long(), num_steps)
    numbers = torch.arange(plan.num_rounds, device=tokens.device)[:, None, None]
    now, hidden = plan.rounds == numbers, plan.rounds >= numbers
    number, row = now.any(2).nonzero(as_tuple=True)
    now, hidden = now[number, row], hidden[number, row]
    drawn = tokens[row]
    states = torch.where(hidden, model.num_tokens, drawn)
    size = max(1, CHUNK // tokens.shape[1])
    parts = [
        model.log_probs(encode(some, model.num_tokens)).gather(-1, theirs[..., None]).squeeze(-1)
        for some, theirs in zip(states.split(size), drawn.split(size), strict=True)
    ]
    chosen = torch.cat(parts)
    return torch.zeros(tokens.shape, device=tokens.device).index_add(0, row, torch.where(now, chosen, 0.0))
