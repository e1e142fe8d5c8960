"""The state of a run as Ray metrics, which every node's agent exports in Prometheus' format."""

import time

from ray.util.metrics import Gauge

UPDATE_SECONDS = 1.0
GAUGES = {
    "trajectories_per_second": "Trajectories that the rollout actors delivered, per second",
    "policy_lag": "Versions between the weights that drew a batch and those it trained, queue time included",
    "num_rollout_actors": "Rollout actors at work",
    "num_rollout_calls": "Rollout calls under way",
    "num_waiting_batches": "Batches that wait for the learner",
    "num_waiting_adds": "Batches on their way into the replay buffer",
    "num_restarts": "Actors started anew",
    "learner_utilisation": "Share of the time in which the learner computed",
}
"""Name (exported as `ray_sequence_flows_` and this) -> description."""


class RunGauges:
    """One gauge for each of `GAUGES`, tagged with the name of the run."""

    def __init__(self, run_name: str):
        self._gauges = {
            name: Gauge(f"sequence_flows_{name}", description=text, tag_keys=("run",)) for name, text in GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run_name})
        self._last, self._num_sampled = time.monotonic(), 0

    @property
    def due(self) -> bool:
        """Whether it is time for the next `update`."""
        return time.monotonic() - self._last >= UPDATE_SECONDS

    def update(self, num_sampled: int, figures: dict[str, float]) -> None:
        """Show `figures`, and the speed since the last update from the trajectories drawn so far."""
        now = time.monotonic()
        speed = max(0, num_sampled - self._num_sampled) / (now - self._last)
        self._last, self._num_sampled = now, num_sampled
        for name, value in {"trajectories_per_second": speed, **figures}.items():
            if name in self._gauges:
                self._gauges[name].set(value)
