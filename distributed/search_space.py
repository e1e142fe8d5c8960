"""The search space of a sweep: which config keys vary, over which values, under which condition."""

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from distributed.config import ConfigError, apply_values, validate
from learner.configs import StrictConfig

MAX_POINTS = 100_000
Pair = tuple[float, float]
Step = Annotated[float, Field(gt=0)]


class Domain(StrictConfig):
    """The values of one key: exactly one of the kinds, and perhaps a condition."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these, drawn uniformly."""
    grid: tuple[Any, ...] | None = Field(None, min_length=1)
    """Each of these, combined with all other grids."""
    uniform: Pair | None = None
    """A number between two ends."""
    loguniform: Pair | None = None
    """A number between two positive ends, uniform in its logarithm."""
    randint: tuple[int, int] | None = None
    """A whole number from the first to the second, which is excluded."""
    quniform: tuple[float, float, Step] | None = None
    """Like uniform, rounded to multiples of the third."""
    qloguniform: tuple[float, float, Step] | None = None
    """Like loguniform, rounded to multiples of the third."""
    qrandint: tuple[int, int, Annotated[int, Field(gt=0)]] | None = None
    """A multiple of the third from the first to the second, which is included."""
    when: dict[str, Any] = Field(default_factory=dict)
    """The key varies only where these others have these values; elsewhere the base experiment's value holds."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Domain":
        kinds = [name for name in KINDS if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"has {' and '.join(kinds) or 'no kind'}; allowed: exactly one of {', '.join(KINDS)}")
        if self.is_listed:
            return self
        low, high = self.values[:2]
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"{self.kind}: got {low:g} and {high:g}; allowed: two finite numbers, the smaller one first"
            )
        if "log" in self.kind and low <= 0:
            raise ValueError(f"{self.kind}: the lower end {low:g} must be positive")
        for end in (low, high) if self.kind.startswith("q") else ():
            if not math.isclose(end / self.values[2], round(end / self.values[2]), abs_tol=1e-9):
                raise ValueError(f"{self.kind}: the end {end:g} must be a multiple of {self.values[2]:g}")
        return self

    @property
    def kind(self) -> str:
        """Which of the kinds it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def is_listed(self) -> bool:
        """Whether its values are listed one by one, rather than given as a range."""
        return self.kind in ("choice", "grid")

    @property
    def values(self) -> tuple[Any, ...]:
        """What was given for it."""
        return getattr(self, self.kind)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values that are valid only if all are: every listed one, or the ends of a range."""
        if self.is_listed:
            return self.values
        low, high = self.values[:2]
        return (low, high - 1) if self.kind == "randint" else (low, high)

    def draw(self, rng: np.random.Generator) -> Any:
        """A value at random; of a grid too."""
        if self.is_listed:
            return self.values[rng.integers(len(self.values))]
        low, high = self.values[:2]
        if "randint" in self.kind:
            step = self.values[2] if self.kind == "qrandint" else 1
            return step * int(rng.integers(low // step, (high // step) + (self.kind == "qrandint")))
        drawn = math.exp(rng.uniform(math.log(low), math.log(high))) if "log" in self.kind else rng.uniform(low, high)
        return self.round(drawn)

    def round(self, value: float) -> Any:
        """`value`, brought between the ends of a range and onto its steps."""
        low, high = self.extremes[0], self.extremes[-1]
        value = min(max(value, low), high)
        if self.kind.startswith("q"):
            value = float(f"{round(value / self.values[2]) * self.values[2]:.12g}")
        return round(value) if "randint" in self.kind else float(value)


KINDS = ("choice", "grid", "uniform", "loguniform", "randint", "quniform", "qloguniform", "qrandint")
Space = Mapping[str, Domain]


def applicable(base: dict[str, Any], space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `point` whose condition holds when the others have their values in it, or in the base experiment."""
    conditioned = any(key in space and space[key].when for key in point)
    known = (dotted(validate(base).model_dump(mode="json")) if conditioned else {}) | dict(point)
    return {
        key: value
        for key, value in point.items()
        if key not in space or all(known.get(other) == wanted for other, wanted in space[key].when.items())
    }


def on_steps(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """`point` with the values of ranges between their ends and on their steps, as some searches leave them."""
    ranges = {key: space[key] for key in point if key in space and not space[key].is_listed}
    return dict(point) | {key: domain.round(point[key]) for key, domain in ranges.items()}


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def check_space(base: dict[str, Any], space: Space) -> None:
    """Raises ConfigError for a key, or an extreme value of one, with which the base experiment is not valid."""
    validate(base)
    for key, domain in space.items():
        for other in domain.when:
            if other == key:
                raise ConfigError(f"sweep.space.{key}.when: refers to itself")
            if other in space and space[other].when:
                raise ConfigError(
                    f"sweep.space.{key}.when: {other} has a condition itself; allowed: keys without, so name that condition here"
                )
        for value in domain.extremes:
            try:
                validate(apply_values(base, {**domain.when, key: value}))
            except ConfigError as error:
                raise ConfigError(f"sweep.space.{key}: {value!r} is not allowed ({error})") from error


def draw_points(base: dict[str, Any], space: Space, num_samples: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """`num_samples` points at random, each with every combination of the grids; raises ConfigError for one not valid.

    A grid whose condition does not hold counts once, not as many times as it has values.
    """
    grids = {key: domain.values for key, domain in space.items() if domain.kind == "grid"}
    points: list[dict[str, Any]] = []
    number = num_samples * math.prod(len(values) for values in grids.values())
    if number > MAX_POINTS:
        raise ConfigError(f"sweep.space: {number:,} points; allowed: up to {MAX_POINTS:,}")
    for _ in range(num_samples):
        drawn = {key: domain.draw(rng) for key, domain in space.items() if key not in grids}
        for values in itertools.product(*grids.values()):
            combined = drawn | dict(zip(grids, values, strict=True))
            point = {key: combined[key] for key in space}
            chosen = applicable(base, space, point)
            if any(point[key] != values[0] for key, values in grids.items() if key not in chosen):
                continue
            try:
                validate(apply_values(base, chosen))
            except ConfigError as error:
                raise ConfigError(f"sweep.space: the point {chosen} is not allowed ({error})") from error
            points.append(point)
    return points
