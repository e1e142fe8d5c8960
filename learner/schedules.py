"""Schedules over learner steps."""

import math


def learning_rate_factor(step: int, total_steps: int, *, warmup: int, final: float) -> float:
    """Share of the full step size at `step`: a linear warm-up, then a half cosine from 1 to `final` at `total_steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
