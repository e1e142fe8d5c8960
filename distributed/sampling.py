"""Drawing sequences from a trained sampler, and choosing candidates among them: what `sample` and the API share.

Shapes: n sequences, T positions.
"""

import logging
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator

from actors.environments.sequence import SequenceEnvironment
from actors.trajectories import TrajectoryBatch, concatenate
from distributed.config import ConfigError, ExperimentConfig, apply_values, validate
from distributed.config_keys import validate_section
from distributed.design_evaluation import DesignEvaluator
from distributed.evaluate import open_evaluator
from distributed.evaluation import Evaluator
from distributed.experiment import derive_seed
from distributed.forecast_evaluation import ForecastEvaluator
from learner.configs import StrictConfig
from learner.drakes.constraints import ForbiddenMotifsConfig, Motif
from learner.drakes.filters import FilterConfig
from learner.drakes.sampling import parse_template
from learner.gflownet import EvaluationWeights
from learner.metrics import NoSampleError, diverse_subset
from learner.rewards import valid_scores

logger = logging.getLogger(__name__)
SequenceEvaluator = Evaluator | DesignEvaluator
CHUNK = 4096
"""Sequences drawn, or looked through for motifs, at once."""
DRAWN_PER_CANDIDATE, MIN_DRAWN = 10, 2048


class SampleConfig(StrictConfig):
    """How many sequences are drawn, how, and which of them are kept."""

    n: int = Field(100, ge=1, le=10_000_000)
    """Sequences wanted."""
    seed: int = Field(0, ge=0)
    """Seed of the draw."""
    noise: bool = True
    """Draw with the environment's noise; false: as the policy intends."""
    template: str | None = None
    """For drakes: positions to keep, and N where to fill, such as ACGNNNNN."""
    temperature: float | None = None
    """For drakes: logits are divided by it."""
    top_k: int | None = None
    """For drakes: draw only from the k likeliest letters."""
    top_p: float | None = None
    """For drakes: draw only from the likeliest letters that reach this mass."""
    select: Literal["top", "diverse"] | None = None
    """Draw many, drop those that the limits below exclude, and keep each once: the n that score best, or from the best on
    always the one farthest from those kept (Hamming distance; of several, the best). null: keep what is drawn."""
    num_drawn: int | None = Field(None, ge=1, le=10_000_000)
    """For `select`: sequences drawn; null: ten times n, at least 2,048."""
    min_score: float | None = None
    """For `select`: least score."""
    gc_min: float | None = Field(None, ge=0, le=1)
    """For `select`: least share of G and C."""
    gc_max: float | None = Field(None, ge=0, le=1)
    """For `select`: largest share of G and C."""
    forbid: tuple[Motif, ...] = ()
    """For `select`: motifs (letters of IUPAC) that neither strand may hold."""

    @model_validator(mode="after")
    def _consistent(self) -> "SampleConfig":
        if self.select is None and (self.num_drawn or self.forbid or self._limits()):
            raise ValueError("num_drawn, min_score, gc_min, gc_max and forbid go with select: top or diverse")
        if self.select is not None and self.num_drawn is not None and self.num_drawn < self.n:
            raise ValueError(f"num_drawn: {self.num_drawn} are fewer than the {self.n} wanted")
        if self.gc_min is not None and self.gc_max is not None and self.gc_min > self.gc_max:
            raise ValueError(f"gc_min: {self.gc_min:g} is above gc_max {self.gc_max:g}")
        return self

    def _limits(self) -> bool:
        return any(limit is not None for limit in (self.min_score, self.gc_min, self.gc_max))

    @property
    def count(self) -> int:
        """Sequences to draw."""
        if self.select is None:
            return self.n
        return self.num_drawn or max(DRAWN_PER_CANDIDATE * self.n, MIN_DRAWN)


class Samples(NamedTuple):
    """Sequences and what is known of them."""

    sequences: list[str]
    scores: np.ndarray
    """float32 [n], by the oracle; NaN where it has none."""
    log_policy: np.ndarray
    """float32 [n]: log-probability of what the policy intended [nats]; of a masked-diffusion model, of what it revealed."""


def sample(config: ExperimentConfig, weights: EvaluationWeights, wanted: SampleConfig) -> Samples:
    """Draw from a trained sampler, and choose. Raises ConfigError for what does not fit it, NoSampleError if none remains."""
    if config.generator.name == "forecast":
        raise ConfigError("generator.name forecast draws no sequences, but paths: see Run.forecast")
    never = apply_values(config.model_dump(mode="json"), {"evaluation.exact": "never"})
    evaluator = open_evaluator(validate(never), weights)
    assert not isinstance(evaluator, ForecastEvaluator)
    try:
        how, environment = _how(wanted, evaluator), evaluator.environment
        if wanted.forbid or wanted.gc_min is not None or wanted.gc_max is not None:
            _check_bases(environment.config.alphabet)
        batch = draw(evaluator, weights, wanted.count, seed=wanted.seed, **how)
    finally:
        evaluator.oracle.close()
    if wanted.select is not None:
        batch = batch[choose(batch, environment, wanted)]
    sequences = environment.sequences(batch.tokens, environment.lengths(batch.tokens, batch.num_steps))
    return Samples([s.decode("ascii") for s in sequences.tolist()], batch.scores, batch.log_behaviour.sum(1))


def _how(wanted: SampleConfig, evaluator: SequenceEvaluator) -> dict[str, Any]:
    """What `samples` of the evaluator takes besides number and seed; raises ConfigError for what does not fit it."""
    filters = wanted.model_dump(include={"temperature", "top_k", "top_p"}, exclude_none=True)
    if not isinstance(evaluator, DesignEvaluator):
        if filters or wanted.template is not None:
            raise ConfigError("template, temperature, top_k and top_p go with generator.name drakes only")
        return {"noise": wanted.noise}
    how: dict[str, Any] = {"filters": validate_section(FilterConfig, "", filters)}
    if wanted.template is not None:
        environment = evaluator.environment.config
        try:
            how["template"] = parse_template(wanted.template.upper(), environment.alphabet, environment.length)
        except ValueError as error:
            raise ConfigError(f"template: {error}") from error
    return how


def draw(
    evaluator: SequenceEvaluator, weights: EvaluationWeights, count: int, *, seed: int, **how: Any
) -> TrajectoryBatch:
    """`count` scored trajectories, drawn in chunks so that memory stays bounded; `how`: see `samples` of the evaluator."""
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    return concatenate(
        [
            evaluator.samples(weights, size, seed=derive_seed(seed, "sample", index), **how)
            for index, size in enumerate(sizes)
        ]
    )


def choose(batch: TrajectoryBatch, environment: SequenceEnvironment, wanted: SampleConfig) -> np.ndarray:
    """int64 [up to n]: rows of `batch` to keep, the best first; a warning says why where there are fewer.

    Raises NoSampleError if none remains.
    """
    lengths = environment.lengths(batch.tokens, batch.num_steps)
    sequences = environment.sequences(batch.tokens, lengths)
    rows = np.unique(sequences, return_index=True)[1]
    remaining = [f"{len(batch):,} drawn, {len(rows):,} distinct"]
    for what, keep in _limits(wanted):
        rows = rows[keep(sequences[rows], batch.scores[rows])]
        remaining.append(f"{len(rows):,} {what}")
    story = ", ".join(remaining)
    if not len(rows):
        raise NoSampleError(f"no candidate remains: {story}; draw more, or relax the limits")
    if len(rows) < wanted.n:
        logger.warning(
            "%s candidates remain of the %s wanted: %s; draw more (--from), or relax the limits",
            f"{len(rows):,}", f"{wanted.n:,}", story,
        )  # fmt: skip
    actions, scores = environment.as_actions(batch.tokens[rows], lengths[rows]), batch.scores[rows]
    if wanted.select == "diverse":
        return rows[diverse_subset(actions, scores, wanted.n)]
    return rows[np.argsort(-scores, kind="stable")[: wanted.n]]


def _limits(wanted: SampleConfig) -> list[tuple[str, Any]]:
    """(name, function of sequences bytes [n] and scores [n] that gives what to keep, bool [n]) of each limit set."""
    limits: list[tuple[str, Any]] = [("with a valid score", lambda _, scores: valid_scores(scores))]
    if (least := wanted.min_score) is not None:
        limits.append((f"scoring {least:g} or more", lambda _, scores: scores >= least))
    if wanted.gc_min is not None or wanted.gc_max is not None:
        low, high = wanted.gc_min or 0.0, 1.0 if wanted.gc_max is None else wanted.gc_max
        limits.append((f"with a GC content of {low:g} to {high:g}", lambda s, _: _gc_within(s, low, high)))
    if wanted.forbid:
        limits.append((f"without {', '.join(wanted.forbid)}", lambda s, _: ~_holds(s, wanted.forbid)))
    return limits


def _check_bases(alphabet: str) -> None:
    if not set(alphabet) <= set("ACGTU") or {"T", "U"} <= set(alphabet):
        raise ConfigError(f"gc_min, gc_max and forbid are for DNA or RNA; the alphabet is {alphabet}")


def _letters(sequences: np.ndarray) -> np.ndarray:
    """uint8 [n, T]: codes of the letters of `sequences` bytes [n], 0 beyond their ends."""
    return sequences.view(np.uint8).reshape(len(sequences), sequences.dtype.itemsize)


def _gc_within(sequences: np.ndarray, low: float, high: float) -> np.ndarray:
    letters = _letters(sequences)
    counts, lengths = np.isin(letters, list(b"GC")).sum(1), (letters > 0).sum(1)
    return (counts >= low * lengths - 1e-9) & (counts <= high * lengths + 1e-9)


def _holds(sequences: np.ndarray, motifs: tuple[str, ...]) -> np.ndarray:
    """bool [n]: whether either strand holds a motif, by the soft count of sites, which is exact on one-hots."""
    rule = ForbiddenMotifsConfig(name="forbidden_motifs", motifs=motifs)
    found = np.zeros(len(sequences), bool)
    for start in range(0, len(sequences), CHUNK):
        letters = _letters(sequences[start : start + CHUNK])
        bases = np.stack([np.isin(letters, list(base)) for base in (b"A", b"C", b"G", b"TU")], -1)
        sites = rule.penalty(torch.from_numpy(bases.astype(np.float32)))
        found[start : start + CHUNK] = sites.numpy() > 0.5
    return found
