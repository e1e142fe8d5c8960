"""When a run is done before its last learner step: a metric that is good enough."""

from pydantic import Field, model_validator

from distributed.backend import RunFailed
from learner.configs import StrictConfig


class StopWhenConfig(StrictConfig):
    """A metric of the evaluations, and the value at which the run is done."""

    metric: str | None = Field(None, min_length=1, max_length=100)
    """A figure of the evaluations every `evaluation.every_steps`, such as excess_kl or mean_score; null: do not stop early."""
    below: float | None = None
    """Done when the metric is below this; give either this or `above`."""
    above: float | None = None
    """Done when the metric is above this."""

    @model_validator(mode="after")
    def _whole(self) -> "StopWhenConfig":
        num_limits = (self.below is not None) + (self.above is not None)
        if num_limits != (self.metric is not None):
            raise ValueError("metric goes with either below or above")
        return self

    def reason(self, step: int, metrics: dict[str, float]) -> str | None:
        """What is reached by the `metrics` of an evaluation at `step`, or None.

        Raises RunFailed if the evaluation has no such metric.
        """
        if self.metric is None:
            return None
        if self.metric not in metrics:
            raise RunFailed(
                f"run.stop_when.metric: the evaluations of this run have no {self.metric!r}; "
                f"they have {', '.join(sorted(metrics))}"
            )
        value = metrics[self.metric]
        if self.below is not None and value < self.below:
            return f"run.stop_when: {self.metric} {value:.4g} is below {self.below:g} at step {step:,}"
        if self.above is not None and value > self.above:
            return f"run.stop_when: {self.metric} {value:.4g} is above {self.above:g} at step {step:,}"
        return None
