"""The first steps of every kind of learner, number by number: proof that a change of code changed no arithmetic.

    python -m tests.golden_curves

writes golden_curves.json anew; do so when numbers are meant to change, and say why in the commit. On another processor or
release of PyTorch, sums are rounded otherwise: hence the tolerance.
"""

import json
from pathlib import Path
from typing import Any

import torch

from distributed.config import validate
from distributed.local_backend import SerialBackend

FILE = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-3
"""Relative difference that counts as rounding; a change of an update or of a random draw is far beyond it."""
SECTIONS: dict[str, Any] = {
    "run": {"backend": "serial", "num_learner_steps": 100, "seed": 0},
    "environment": {"noise": 0.2},
    "network": {"hidden_size": 16, "num_layers": 2},
    "learner": {"batch_size": 32, "device": "cpu", "warmup_steps": 0},
    "dynamics": {"batch_size": 32, "network": {"hidden_size": 16, "num_layers": 2}},
    "actors": {"batch_size": 32},
    "replay": {"replay_share": 0.25},
}
DRAKES = {
    "environment": {"length": 8, "noise": 0},
    "generator": {
        "name": "drakes",
        "denoiser": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
        "pretraining": {"num_steps": 10, "batch_size": 32},
        "rollout": {"num_steps": 4},
        "reward_model": {"warm_start_steps": 5, "batch_size": 32},
        "batch_size": 16,
    },
    "actors": {"batch_size": 16},
    "replay": {"offline_source": "lower_half", "offline_size": 500},
}
FORECAST = {
    "generator": {"name": "forecast", "likelihood_weight": 0.1},
    "data": {
        "path": str(FILE.parents[1] / "tune_configs" / "elnino.csv"), "time_column": "month",
        "targets": ["temperature"], "window": 12, "horizon": 3, "season": 12, "num_bins": 8,
    },
    "network": {"name": "transformer", "hidden_size": 16, "num_layers": 1, "num_heads": 2},
    "reward": {"floor": 1e-30},
    "objective": {"name": "sgfn_db"},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "with_dynamics": {"objective": {"name": "sgfn_kl", "lookahead_weight": 0.1}},
    "without_dynamics": {"objective": {"name": "gfn_db"}},
    "drakes": DRAKES,
    "forecast": FORECAST,
}
NUM_STEPS = {"drakes": 20}
"""Of drakes, ten of pretraining and ten of fine-tuning; of the others ten."""


def curves(case: str) -> dict[str, list[float]]:
    """Metric -> its values from the step on that has it first."""
    torch.set_num_threads(1)
    backend = SerialBackend(validate(SECTIONS | CASES[case]))
    found: dict[str, list[float]] = {}
    try:
        backend.start(None)
        for _ in range(NUM_STEPS.get(case, 10)):
            learner = backend.learner
            metrics = learner.offline_update(1) if learner.is_offline else backend.step().metrics
            for name, value in metrics.items():
                if not name.endswith("_seconds"):
                    found.setdefault(name, []).append(float(f"{value:.6g}"))
    finally:
        backend.close()
    return found


if __name__ == "__main__":
    lines = [
        f'  "{case}": {{\n'
        + ",\n".join(f'    "{name}": {json.dumps(values)}' for name, values in sorted(curves(case).items()))
        + "\n  }"
        for case in CASES
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(FILE)
