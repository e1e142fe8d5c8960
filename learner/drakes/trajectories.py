"""Log-probabilities of given trajectories of masked diffusion: tokens, and the steps that revealed them.

Shapes: B sequences, L positions, V tokens (the mask is token V).
"""

import torch
from torch import Tensor

from learner.drakes.denoiser import TokenModel, encode
from learner.drakes.sampling import plan_rounds


def trajectory_log_probs(model: TokenModel, tokens: Tensor, reveal_steps: Tensor, num_steps: int) -> Tensor:
    """float [B, L]: log p of each token when it was revealed, differentiable in the model; 0 where it was given.

    `tokens` int64 [B, L]; `reveal_steps` int [B, L], see `sampling.Samples`. Their sum is log p of the trajectory but for
    the reveal events, which do not depend on the model.
    """
    plan = plan_rounds(reveal_steps.long(), num_steps)
    states = torch.where(plan.rounds >= 0, model.num_tokens, tokens)
    log_probs = torch.zeros(tokens.shape, device=tokens.device)
    for number in range(plan.num_rounds):
        rows = plan.rows(number)
        now = plan.rounds[rows] == number
        outputs = model.log_probs(encode(states[rows], model.num_tokens))
        chosen = outputs.gather(-1, tokens[rows][..., None]).squeeze(-1)
        log_probs = log_probs.index_add(0, rows, torch.where(now, chosen, 0.0))
        states[rows] = torch.where(now, tokens[rows], states[rows])
    return log_probs
