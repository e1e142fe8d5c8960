"""Rules for designed DNA: share of G and C, forbidden motifs, length of homopolymers.

Each rule has a differentiable penalty on one-hot, straight-through or relaxed sequences, zero where the rule holds, and an
exact check of finished sequences. A new rule is a config class, which carries both functions, and a member of the union.
Shapes: B sequences, L positions, V = 4 letters (A C G T), M motifs, W positions of the longest motif.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field, StringConstraints
from torch import Tensor
from torch.nn import functional

from learner.configs import StrictConfig
from learner.drakes.reverse_complement import reverse_complement_one_hot

IUPAC = {
    "A": "A", "C": "C", "G": "G", "T": "T", "U": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",
    "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip
"""Bases that a letter of a motif stands for (IUPAC-IUB 1984, Nucleic Acids Research 13:3021)."""
_BASES = "ACGT"
_ROUNDING = 1e-9
Motif = Annotated[str, StringConstraints(pattern=f"^[{''.join(IUPAC)}]+$", max_length=64)]


class Constraint(Protocol):
    """A rule: what the configs below offer."""

    @property
    def name(self) -> str:
        """Kind of rule; names its metrics."""
        ...

    @property
    def weight(self) -> float:
        """Factor of the mean penalty in the loss."""
        ...

    def penalty(self, x: Tensor) -> Tensor:
        """float [B], at least 0 on one-hots, of `x` float [B, L, V]; differentiable."""
        ...

    def violations(self, tokens: Tensor) -> Tensor:
        """int64 [B]: how often each of `tokens` int64 [B, L] breaks the rule; 0: it holds. Exact."""
        ...


class GCContentConfig(StrictConfig):
    """The share of G and C of every sequence is near a target."""

    name: Literal["gc_content"]
    """Kind of rule."""
    target: float = Field(0.5, ge=0, le=1)
    """Wanted share of G and C."""
    dead_band: float = Field(0.0, ge=0, le=1)
    """Distance from the target that costs nothing."""
    weight: float = Field(2.0, ge=0)
    """Factor of the mean penalty in the loss (standardised rewards per squared share)."""

    def penalty(self, x: Tensor) -> Tensor:
        """max(0, |gc - target| - dead_band)² of each sequence, not of the batch's mean, which a mixture would satisfy."""
        share = x[..., 1:3].sum((-2, -1)) / x.shape[-2]
        return torch.relu((share - self.target).abs() - self.dead_band).square()

    def violations(self, tokens: Tensor) -> Tensor:
        """1 outside the dead band; if no whole number of bases lies within it, 1 unless the share is the nearest there is."""
        length = tokens.shape[-1]
        share = ((tokens == 1) | (tokens == 2)).sum(-1).double() / length
        attainable = torch.arange(length + 1, dtype=torch.float64, device=tokens.device) / length
        band = max(self.dead_band, float((attainable - self.target).abs().min()))
        return ((share - self.target).abs() > band + _ROUNDING).long()


class ForbiddenMotifsConfig(StrictConfig):
    """No sequence holds any of some motifs, such as restriction sites."""

    name: Literal["forbidden_motifs"]
    """Kind of rule."""
    motifs: tuple[Motif, ...] = Field(min_length=1)
    """Motifs in the letters of IUPAC, such as GAATTC or CCWGG."""
    both_strands: bool = True
    """Whether the reverse complement of a motif is forbidden too; a palindrome counts once."""
    weight: float = Field(1.0, ge=0)
    """Factor of the mean penalty in the loss (standardised rewards per site)."""

    @cached_property
    def _patterns(self) -> tuple[Tensor, Tensor]:
        """float32 [M, W, V] the bases that match, and [M, W] ones beyond the end of a motif; every pattern once."""
        patterns: dict[tuple[tuple[float, ...], ...], None] = {}
        for motif in self.motifs:
            pattern = torch.tensor([[float(base in IUPAC[letter]) for base in _BASES] for letter in motif])
            for strand in (pattern, reverse_complement_one_hot(pattern)) if self.both_strands else (pattern,):
                patterns[tuple(map(tuple, strand.tolist()))] = None
        width = max(map(len, patterns))
        rows = [functional.pad(torch.tensor(p), (0, 0, 0, width - len(p))) for p in patterns]
        return torch.stack(rows), torch.stack([(torch.arange(width) >= len(p)).float() for p in patterns])

    def penalty(self, x: Tensor) -> Tensor:
        """Soft number of sites: Σ over motifs and starts of the product over positions of the mass on matching bases."""
        matching, beyond = (part.to(x) for part in self._patterns)
        width, length = matching.shape[1], x.shape[-2]
        padded = functional.pad(x, (0, 0, 0, width - 1))
        sites = torch.ones((), dtype=x.dtype, device=x.device)
        for offset in range(width):
            sites = sites * (padded[:, offset : offset + length] @ matching[:, offset].T + beyond[:, offset])
        return sites.sum((-2, -1))

    def violations(self, tokens: Tensor) -> Tensor:
        """Number of sites, overlapping ones included."""
        return self.penalty(functional.one_hot(tokens, len(_BASES)).double()).round().long()


class HomopolymerConfig(StrictConfig):
    """No run of one letter is too long."""

    name: Literal["homopolymer"]
    """Kind of rule."""
    max_run: int = Field(5, ge=1)
    """Longest run that is allowed (positions)."""
    weight: float = Field(1.0, ge=0)
    """Factor of the mean penalty in the loss (standardised rewards per letter too many)."""

    def penalty(self, x: Tensor) -> Tensor:
        """Soft number of letters too many: windows of max_run + 1 positions, each with the mass on its being uniform.

        On one-hots a run of n letters holds max(0, n - max_run) such windows, so this is the exact excess.
        """
        starts = x.shape[-2] - self.max_run
        if starts <= 0:
            return 0 * x.sum((-2, -1))
        uniform = x[:, :starts]
        for offset in range(1, self.max_run + 1):
            uniform = uniform * x[:, offset : offset + starts]
        return uniform.sum((-2, -1))

    def violations(self, tokens: Tensor) -> Tensor:
        """Letters beyond `max_run`, over all runs."""
        if tokens.shape[-1] <= self.max_run:
            return torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        windows = tokens.unfold(-1, self.max_run + 1, 1)
        return (windows == windows[..., :1]).all(-1).sum(-1)


ConstraintConfig = Annotated[
    GCContentConfig | ForbiddenMotifsConfig | HomopolymerConfig,
    Field(discriminator="name"),
]


def constraint_penalties(constraints: Iterable[Constraint], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weight · penalty, float [B], and each rule's mean penalty as `<name>_penalty`, of `x` float [B, L, V].

    Rules of one name add up in the metric, unweighted.
    """
    total, metrics = x.new_zeros(len(x)), dict[str, Tensor]()
    for constraint in constraints:
        penalty = constraint.penalty(x)
        total = total + constraint.weight * penalty
        key = f"{constraint.name}_penalty"
        metrics[key] = metrics.get(key, 0) + penalty.detach().mean()
    return total, metrics


def violation_metrics(constraints: Iterable[Constraint], tokens: Tensor) -> dict[str, float]:
    """Share of finished sequences `tokens` int64 [B, L] that break each rule (`<name>_violated`), and any of them.

    Raises ValueError if there is no sequence.
    """
    if not len(tokens):
        raise ValueError("no sequence to check")
    broken: dict[str, Tensor] = {}
    for constraint in constraints:
        key = f"{constraint.name}_violated"
        broken[key] = broken.get(key, False) | (constraint.violations(tokens) > 0)
    broken["any_violated"] = torch.stack([torch.zeros_like(tokens[:, 0], dtype=torch.bool), *broken.values()]).any(0)
    return {name: float(rows.double().mean()) for name, rows in broken.items()}
