"""Ancestral sampling of masked diffusion: all masked, then N reverse steps that reveal tokens (MDLM, 2406.07524).

In step k = N..1 a masked position is revealed with probability (m(t_k) - m(t_{k-1}))/m(t_k), 1/k for the log-linear
schedule, whatever the network says: only the tokens depend on it. So the step of every position is drawn first, and the
network is asked only about states from which something is revealed: at most L times a sequence, for any N.

Shapes: B sequences, L positions, V tokens (the mask is token V), N steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.drakes.denoiser import TokenModel, encode
from learner.drakes.filters import FilterConfig
from learner.drakes.schedule import LOG_LINEAR, MaskingSchedule, grid

NO_FILTER = FilterConfig()


@dataclass(frozen=True)
class Samples:
    """Finished sequences and how they came about."""

    tokens: Tensor
    """int64 [B, L], without masks."""
    reveal_steps: Tensor
    """int16 [B, L]: step k = N..1 that revealed the position, N+1 where it was given.

    With the tokens this is the whole trajectory: at t_k the positions with a larger number are visible."""
    log_probs: Tensor
    """float [B, L]: log-prob (after filters) of each token when it was revealed, 0 where it was given."""


@dataclass(frozen=True)
class RevealPlan:
    """What is revealed when, in rounds: each round of a sequence reveals the positions of one step.

    A sequence without a further step sits a round out.
    """

    steps: Tensor
    """int64 [B, L]: as `Samples.reveal_steps`."""
    rounds: Tensor
    """int64 [B, L]: round that reveals the position, -1 where it was given."""
    num_rounds: int
    num_early: int
    """Rounds before this one are those of steps above the plan's `split`."""

    def rows(self, number: int) -> Tensor:
        """int64 [R]: sequences of which round `number` reveals something."""
        return (self.rounds == number).any(1).nonzero().squeeze(1)

    def step_of(self, number: int) -> Tensor:
        """int64 [B]: the step of each sequence's round, 0 where it has none."""
        return torch.where(self.rounds == number, self.steps, 0).amax(1)


def draw_reveal_steps(
    masked: Tensor,
    num_steps: int,
    schedule: MaskingSchedule,
    generator: torch.Generator | None = None,
    *,
    start: int = 0,
) -> Tensor:
    """int64 [B, L]: the step k that reveals each position of `masked` bool [B, L], N+1 for the others.

    Sampling begins at step `start` (0: N). P(k) = (m(t_k) - m(t_{k-1}))/m(t_start), the law of the first success of the
    steps' coins; 1/N for the log-linear schedule.
    """
    upper = schedule.mask_prob(grid(num_steps))[1 : (start or num_steps) + 1]
    uniform = torch.rand(masked.shape, generator=generator, device=masked.device, dtype=torch.float64)
    steps = torch.searchsorted(upper.to(masked.device) / upper[-1], uniform, right=True) + 1
    return torch.where(masked, steps, num_steps + 1)


def plan_rounds(steps: Tensor, num_steps: int, *, split: int = 0) -> RevealPlan:
    """Rounds of the `steps` int64 [B, L] of `draw_reveal_steps`; those of steps above `split` come before all others."""
    ordered, order = steps.sort(1, descending=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    drawn = ordered <= num_steps
    early = (new & drawn & (ordered > split)).sum(1)
    num_early = int(early.max()) if len(early) else 0
    rank = (new & drawn).cumsum(1) - 1
    rank = torch.where(ordered > split, rank, rank - early[:, None] + num_early)
    rank = torch.where(drawn, rank, -1)
    rounds = torch.empty_like(rank).scatter(1, order, rank)
    return RevealPlan(steps, rounds, int(rank.max()) + 1 if rank.numel() else 0, num_early)


def gumbel_like(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Gumbel(0, 1) noise of the shape of `values`, as -log of an exponential variable: finite where that is positive."""
    tiny = torch.finfo(values.dtype).tiny
    return -torch.empty_like(values).exponential_(generator=generator).clamp_min(tiny).log()


@torch.no_grad()
def sample(
    model: TokenModel,
    num_sequences: int,
    *,
    num_steps: int,
    filters: FilterConfig = NO_FILTER,
    template: Tensor | None = None,
    schedule: MaskingSchedule = LOG_LINEAR,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Samples:
    """Draw sequences from all masks or, given `template` int64 [L] or [B, L], fill its masks; other positions stay.

    Raises ValueError if `template` has another length or a token that is neither one of V nor the mask.
    """
    if template is None:
        template = torch.full((model.length,), model.num_tokens, device=device)
    start = checked_tokens(template, model).expand(num_sequences, model.length)
    return _denoise(model, start, num_steps, num_steps, filters, schedule, generator)


@torch.no_grad()
def resample(
    model: TokenModel,
    tokens: Tensor,
    level: float,
    *,
    num_steps: int,
    filters: FilterConfig = NO_FILTER,
    schedule: MaskingSchedule = LOG_LINEAR,
    generator: torch.Generator | None = None,
) -> Samples:
    """Local search: noise finished `tokens` int64 [B, L] to time `level` in (0, 1] and denoise them again.

    The level is rounded to the grid, to at least one step. Raises ValueError for a level out of range and as `sample`.
    """
    if not 0 < level <= 1:
        raise ValueError(f"level {level}: allowed: above 0 and at most 1")
    first = max(1, round(level * num_steps))
    mask_prob = schedule.mask_prob(grid(num_steps)[first])
    noise = torch.rand(tokens.shape, generator=generator, device=tokens.device, dtype=torch.float64)
    start = torch.where(noise < mask_prob, model.num_tokens, checked_tokens(tokens, model))
    return _denoise(model, start, num_steps, first, filters, schedule, generator)


def _denoise(
    model: TokenModel,
    start: Tensor,
    num_steps: int,
    first: int,
    filters: FilterConfig,
    schedule: MaskingSchedule,
    generator: torch.Generator | None,
) -> Samples:
    masked = start == model.num_tokens
    steps = draw_reveal_steps(masked, num_steps, schedule, generator, start=first)
    plan, tokens, log_probs = (
        plan_rounds(steps, num_steps),
        start.clone(),
        torch.zeros(start.shape, device=start.device),
    )
    for number in range(plan.num_rounds):
        rows = plan.rows(number)
        logits = filters.apply(model.log_probs(encode(tokens[rows], model.num_tokens)))
        drawn = (logits + gumbel_like(logits, generator)).argmax(-1)
        now = plan.rounds[rows] == number
        tokens[rows] = torch.where(now, drawn, tokens[rows])
        chosen = logits.log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
        log_probs[rows] = torch.where(now, chosen.float(), log_probs[rows])
    assert not (tokens == model.num_tokens).any()
    return Samples(tokens, steps.to(torch.int16), log_probs)


def checked_tokens(tokens: Tensor, model: TokenModel) -> Tensor:
    """`tokens` [.., L] as int64; ValueError naming the position if one is no token or mask of `model`, or L differs."""
    if tokens.shape[-1] != model.length:
        raise ValueError(f"got {tokens.shape[-1]} positions, but the model's sequences have {model.length}")
    wrong = ((tokens < 0) | (tokens > model.num_tokens)).reshape(-1, model.length).nonzero()
    if len(wrong):
        row, position = wrong[0].tolist()
        value = int(tokens.reshape(-1, model.length)[row, position])
        raise ValueError(f"token {value} at position {position + 1}: allowed: 0 to {model.num_tokens} (the mask)")
    return tokens.long()


def parse_template(text: str, alphabet: str, length: int, *, free: str = "N") -> Tensor:
    """int64 [L] from letters of `alphabet` to keep and `free` to fill, such as ACGNNNNN; the mask is V.

    Raises ValueError, naming the position (from 1), for another letter or length, or if `free` is in the alphabet.
    """
    if free in alphabet:
        raise ValueError(f"{free!r} is a letter of the alphabet {alphabet}: use another sign for positions to fill")
    for position, letter in enumerate(text, start=1):
        if letter not in alphabet and letter != free:
            raise ValueError(
                f"template {text}: {letter!r} at position {position} is none of {alphabet}; write {free} to fill it"
            )
        if position > length:
            raise ValueError(f"template {text}: position {position} is beyond the length {length}")
    if len(text) < length:
        raise ValueError(f"template {text}: ends after position {len(text)}, but sequences have {length}")
    return torch.tensor([len(alphabet) if letter == free else alphabet.index(letter) for letter in text])
