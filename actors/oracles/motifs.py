"""Sites of transcription factors in DNA of any length, by the matrices of JASPAR 2026 (CORE names, any matrix id).

    S_m(x) = τ log Σ exp(log-odds of a site / τ),  over starts and strands;   C_m = log-odds of the consensus
    affinity_m = max(0, S_m) / C_m,   or   occupancy_m = σ((S_m - 3/4 C_m) / 1.5 nats)
    score(x) = max(0, mean of motifs - repressor_weight · mean of repressors - gc_weight · (GC(x) - gc_target)²)

One perfect site gives an affinity of 1 (a palindromic one τ log 2 nats more: it counts on both strands), more sites more.
An occupancy is the share of time that a factor is bound: about 0 without a good site, and never more than 1.
Shapes: B sequences, T positions, M motifs, w positions of a motif, W those of the widest one.
"""

import functools
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch.nn import functional

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import OracleDataError
from actors.oracles.jaspar import LETTERS, PSEUDOCOUNT, Motif, motif_matrices
from learner.configs import StrictConfig

HALF_OCCUPIED, OCCUPANCY_SLOPE = 0.75, 1.5
"""Share of the consensus' log-odds at which a factor is bound half the time, and nats over which that changes."""
CHUNK_BYTES = 16 << 20
"""Most memory that scoring takes for its intermediate results."""


class MotifsConfig(StrictConfig):
    """Binding sites of transcription factors, by JASPAR motifs."""

    name: Literal["motifs"]
    """Kind of oracle."""
    motifs: tuple[str, ...] = Field(min_length=1)
    """JASPAR matrix ids (MA0139.2; MA0139: its latest version) or names (SPI1); sites of each raise the score."""
    repressors: tuple[str, ...] = ()
    """Ids or names of motifs whose sites lower the score."""
    repressor_weight: float = Field(1.0, ge=0)
    """Factor of the repressors' mean affinity."""
    scale: Literal["affinity", "occupancy"] = "affinity"
    """What of each motif is averaged: affinity (any resemblance to a site counts) or occupancy (only good sites do)."""
    gc_background: float = Field(0.5, gt=0, lt=1)
    """Share of G and C of the background that log-odds are against; in the human genome .41."""
    gc_target: float | None = Field(None, ge=0, le=1)
    """Share of G and C at which nothing is deducted; null: any share will do."""
    gc_weight: float = Field(1.0, ge=0)
    """Factor of the squared distance from `gc_target`; no effect without one."""
    softness: float = Field(1.0, ge=0.01, le=100)
    """τ of the sum over sites, in nats; 1: sites add up as in binding equilibrium; near 0: the best one counts alone;
    larger: weak ones count too, so that every affinity is higher."""
    pseudocount: float = Field(PSEUDOCOUNT, ge=1e-6, le=1e6)
    """Added to the counts of each motif position, a quarter to each letter; larger: rare letters cost less."""

    @field_validator("motifs", "repressors")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len({motif.casefold() for motif in value}) < len(value):
            raise ValueError("each motif may be listed once")
        return value


class MotifsOracle:
    """Scores by the sites of motifs."""

    enumerable = True
    reference: np.ndarray | None = None

    def __init__(self, config: MotifsConfig, environment: SequenceEnvironment):
        """Reads the matrices; raises OracleDataError for unknown or repeated motifs and those that do not fit."""
        alphabet = environment.config.alphabet
        if sorted(alphabet) != list(LETTERS):
            raise OracleDataError(
                f"oracle.name motifs needs an environment.alphabet of the letters {LETTERS} in any order, got {alphabet!r}"
            )
        self._config = config
        matrices = functools.partial(motif_matrices, pseudocount=config.pseudocount, gc_background=config.gc_background)
        wanted, unwanted = matrices(config.motifs), matrices(config.repressors, origin="oracle.repressors")
        self.motifs = [*wanted, *unwanted]
        """Those that raise the score, then the repressors."""
        _check(self.motifs, [*config.motifs, *config.repressors], environment.space.max_length)
        self._widths = torch.tensor([len(motif.log_odds) for motif in self.motifs])
        self._consensus = torch.tensor([motif.log_odds.max(1).sum() for motif in self.motifs]).float()
        self._filters = _filters(self.motifs, alphabet) / config.softness
        self._strong = [alphabet.index(letter) for letter in "GC"]

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Scores float32 [B] of `tokens` int [B, T] with `lengths` int [B]; all are finite and >= 0."""
        config = self._config
        bound = self.binding(tokens, lengths).astype(np.float64)
        num_wanted = len(config.motifs)
        scores = bound[:, :num_wanted].mean(1)
        if config.repressors:
            scores -= config.repressor_weight * bound[:, num_wanted:].mean(1)
        if config.gc_target is not None:
            inside = np.arange(tokens.shape[1]) < lengths[:, None]
            share = (np.isin(tokens, self._strong) & inside).sum(1) / np.maximum(lengths, 1)
            scores -= config.gc_weight * (share - config.gc_target) ** 2
        return np.maximum(scores, 0).astype(np.float32)

    @torch.no_grad()
    def binding(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float32 [B, M]: affinity or occupancy, as `scale` says, of the `motifs` in `tokens` int [B, T] with `lengths`
        int [B]; 0 where a motif has no room."""
        num_motifs, widest = len(self.motifs), self._filters.shape[2]
        positions = tokens.shape[1] + widest - 1
        chunk = max(1, CHUNK_BYTES // (positions * (4 * 5 + num_motifs * 20)))  # letters; two floats a strand and site
        bound = np.empty((len(tokens), num_motifs), dtype=np.float32)
        for start in range(0, len(tokens), chunk):
            rows = slice(start, start + chunk)
            bound[rows] = self._binding(torch.tensor(tokens[rows]), torch.tensor(lengths[rows])).numpy()
        return bound

    def _binding(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """float32 [b, M] of one chunk: a site may start anywhere, those that reach over the end are left out."""
        padded = functional.pad(tokens, (0, self._filters.shape[2] - 1), value=-1)
        letters = (padded[:, None, :] == torch.arange(len(LETTERS))[:, None]).float()
        sites = functional.conv1d(letters, self._filters).unflatten(1, (-1, 2))  # [b, M, strand, T]
        last_start = lengths.long()[:, None] - self._widths
        sites.masked_fill_((torch.arange(tokens.shape[1]) > last_start[:, :, None])[:, :, None], -torch.inf)
        sums = sites.flatten(2).logsumexp(2) * self._config.softness
        if self._config.scale == "occupancy":
            return ((sums - HALF_OCCUPIED * self._consensus) / OCCUPANCY_SLOPE).sigmoid()
        return sums.clamp_min(0) / self._consensus

    def close(self) -> None:
        """Nothing to release."""


def _check(motifs: list[Motif], asked: list[str], max_length: int) -> None:
    seen: dict[str, str] = {}
    for motif, name in zip(motifs, asked, strict=True):
        shown = f"{motif.matrix_id} ({motif.name})"
        if motif.matrix_id in seen:
            raise OracleDataError(
                f"oracle.motifs and oracle.repressors: {seen[motif.matrix_id]!r} and {name!r} are both {shown}; "
                "each motif may be listed once"
            )
        seen[motif.matrix_id] = name
        width = len(motif.log_odds)
        if width > max_length:
            raise OracleDataError(
                f"oracle.name motifs: {shown} is {width} wide; allowed: up to environment.length {max_length}"
            )


def _filters(motifs: list[Motif], alphabet: str) -> torch.Tensor:
    """float32 [2M, 4, W]: both strands of each motif, letters as in `alphabet`, zeros right of narrower motifs."""
    columns = [LETTERS.index(letter) for letter in alphabet]
    filters = torch.zeros(len(motifs), 2, len(LETTERS), max(len(motif.log_odds) for motif in motifs))
    for row, motif in zip(filters, motifs, strict=True):
        for strand, log_odds in zip(row, (motif.log_odds, motif.log_odds[::-1, ::-1]), strict=True):
            strand[:, : len(log_odds)] = torch.tensor(log_odds[:, columns].T)
    return filters.flatten(0, 1)
