"""What is adjusted while fine-tuning runs: the weight alpha of the KL, and learning rates."""

import math
from functools import partial
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator
from torch.optim import Optimizer, lr_scheduler

from learner.configs import StrictConfig
from learner.schedules import learning_rate_factor

_EPSILON = 1e-8


class AlphaConfig(StrictConfig):
    """How the weight of the KL to the pretrained model is set (standardised rewards per nat)."""

    mode: Literal["kl", "reward", "fixed"] = "kl"
    """kl: steered towards `kl_target`. reward: initial / (share of the way from the pretrained mean reward to the data's
    best), so it falls as the reward rises. fixed: always `initial`."""
    initial: float = Field(0.1, gt=0)
    """alpha at the start; mode reward: when the mean reward has reached that of the data's best."""
    minimum: float = Field(1e-3, gt=0)
    """Lower bound after the warm-up."""
    maximum: float = Field(10.0, gt=0)
    """Upper bound."""
    kl_target: float = Field(3.0, gt=0)
    """KL of the paths that mode kl keeps to (nats a sequence)."""
    kl_rate: float = Field(0.1, gt=0, le=2)
    """Change of log alpha in an update for each unit of KL / kl_target - 1, which counts up to ±1/2."""
    warmup_updates: int = Field(0, ge=0)
    """Updates over which alpha grows linearly to `initial`; no mode adjusts it meanwhile."""

    @model_validator(mode="after")
    def _ordered(self) -> "AlphaConfig":
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"initial {self.initial} must lie between minimum {self.minimum} and maximum {self.maximum}"
            )
        return self


class AlphaController:
    """Holds alpha; `update` once a fine-tuning step."""

    def __init__(self, config: AlphaConfig, *, reward_low: float | None = None, reward_high: float | None = None):
        """Mode reward needs the pretrained model's mean reward and the data's 99th percentile; else ValueError."""
        if config.mode == "reward" and not (
            reward_low is not None and reward_high is not None and -math.inf < reward_low < reward_high < math.inf
        ):
            raise ValueError(
                f"mode reward needs reward_low < reward_high, both finite; got {reward_low}, {reward_high}"
            )
        self.config, self._low, self._high = config, reward_low or 0.0, reward_high or 0.0
        self._alpha, self._num_updates = config.initial, 0

    @property
    def alpha(self) -> float:
        """The weight to use now."""
        warmup = self.config.warmup_updates
        return self._alpha * min(1.0, (self._num_updates + 1) / (warmup + 1))

    def update(self, *, kl: float, mean_reward: float) -> float:
        """Take in the KL of the paths [nats] and the mean of recent oracle rewards; the new alpha.

        Raises ValueError if the one that the mode reads is NaN.
        """
        read = {"kl": kl, "reward": mean_reward, "fixed": 0.0}[self.config.mode]
        if math.isnan(read):
            raise ValueError(f"alpha.mode {self.config.mode}: the measured value is NaN")
        self._num_updates += 1
        if self._num_updates > self.config.warmup_updates and self.config.mode != "fixed":
            proposed = self._by_kl(kl) if self.config.mode == "kl" else self._by_reward(mean_reward)
            self._alpha = min(max(proposed, self.config.minimum), self.config.maximum)
        return self.alpha

    def _by_kl(self, kl: float) -> float:
        excess = min(max(kl / self.config.kl_target - 1, -0.5), 0.5)
        return self._alpha * math.exp(self.config.kl_rate * excess)

    def _by_reward(self, mean_reward: float) -> float:
        progress = (mean_reward - self._low) / (self._high - self._low)
        return self.config.initial / (max(progress, 0.0) + _EPSILON)

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to go on."""
        return {"alpha": self._alpha, "num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue where `state` was taken."""
        self._alpha, self._num_updates = state["alpha"], int(state["num_updates"])


SchedulerName = Literal["onecycle", "cosine", "plateau", "constant"]


class Scheduler(Protocol):
    """A learning-rate schedule that the loop need not know the kind of."""

    def on_step(self) -> None:
        """After every optimiser step."""
        ...

    def on_eval(self, metric: float) -> None:
        """After every evaluation; larger `metric` is better."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        ...


class _PerStep:
    """A schedule of optimiser steps, that keeps its last value beyond `last_step`."""

    def __init__(self, schedule: lr_scheduler.LRScheduler, last_step: float):
        self._schedule, self._last_step = schedule, last_step

    def on_step(self) -> None:
        if self._schedule.last_epoch < self._last_step:
            self._schedule.step()

    def on_eval(self, metric: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self._schedule.state_dict().items() if not k.startswith("_")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._schedule.load_state_dict(state)


class _PerEvaluation:
    """A schedule that lowers the rate when the metric stands still."""

    def __init__(self, schedule: lr_scheduler.ReduceLROnPlateau):
        self._schedule = schedule

    def on_step(self) -> None:
        pass

    def on_eval(self, metric: float) -> None:
        self._schedule.step(metric)

    def state_dict(self) -> dict[str, Any]:
        return self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._schedule.load_state_dict(state)


def make_scheduler(
    name: SchedulerName,
    optimiser: Optimizer,
    total_steps: int,
    *,
    warmup_share: float = 0.3,
    final_share: float = 0.0,
    factor: float = 0.5,
    patience: int = 5,
    threshold: float = 1e-3,
) -> Scheduler:
    """The schedule `name` of an optimiser whose present learning rates are the largest.

    onecycle: rises from 1/25 over `warmup_share` of `total_steps`, then falls to 4e-6 (Smith & Topin 2019, 1708.07120);
    cosine: from 1 to `final_share` (Loshchilov & Hutter 2017, 1608.03983); plateau: times `factor` after more than
    `patience` evaluations without a gain of `threshold` (units of the metric), never below `final_share`; constant. Beyond
    `total_steps` the rate stays as it is. Raises ValueError for an unknown name or fewer than two steps.
    """
    if total_steps < 2:
        raise ValueError(f"total_steps: got {total_steps}; allowed: 2 or more")
    rates = [float(group["lr"]) for group in optimiser.param_groups]
    if name == "onecycle":
        onecycle = lr_scheduler.OneCycleLR(
            optimiser, rates, total_steps, pct_start=warmup_share, anneal_strategy="cos", cycle_momentum=False
        )
        return _PerStep(onecycle, total_steps - 1)
    if name == "cosine":
        factors = partial(learning_rate_factor, total_steps=total_steps, warmup=0, final=final_share)
        return _PerStep(lr_scheduler.LambdaLR(optimiser, factors), total_steps)
    if name == "plateau":
        return _PerEvaluation(
            lr_scheduler.ReduceLROnPlateau(
                optimiser, mode="max", factor=factor, patience=patience, threshold=threshold,
                threshold_mode="abs",  # a relative one would take a falling negative metric for a rising one
                min_lr=[final_share * rate for rate in rates],
            )
        )  # fmt: skip
    if name == "constant":
        return _PerStep(lr_scheduler.LambdaLR(optimiser, lambda _: 1.0), math.inf)
    raise ValueError(f"scheduler: got {name!r}; allowed: onecycle, cosine, plateau, constant")
