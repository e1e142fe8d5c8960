"""Run the benchmarks:  python -m tests.benchmarks [--quick] [--only NAME] [--json FILE]"""

import argparse
import json
import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from distributed.training_loop import git_commit
from tests.benchmarks import costs, drakes, forecast, runs, scaling, speed, sweeps, time_to_quality

BENCHMARKS = {
    "actors": costs.actors,
    "buffer": costs.buffer,
    "drakes_motifs": drakes.motifs,
    "drakes_pretraining": drakes.pretraining,
    "drakes_steps": costs.drakes_steps,
    "drakes_tfbind8": drakes.tfbind8,
    "forecast": forecast.forecast,
    "one_core": speed.one_core,
    "quality": runs.quality,
    "ray_overhead": runs.ray_overhead,
    "scaling": scaling.scaling,
    "shapes": speed.shapes,
    "start_up": costs.start_up,
    "sweep_overhead": sweeps.sweep_overhead,
    "time_to_quality": time_to_quality.time_to_quality,
}


def main() -> None:
    """Run, print a table, write JSON with flat keys."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short runs: shows that everything works, not how fast")
    parser.add_argument(
        "--only", choices=sorted(BENCHMARKS), action="append", help="run only this one; may be repeated"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    machine = f"{os.cpu_count()} × {platform.processor() or platform.machine()}, torch {torch.__version__}"
    figures = {}
    for name in options.only or BENCHMARKS:
        table = Table("figure", "value", title=f"{name} ({machine})")
        for key, value in BENCHMARKS[name](options.quick).items():
            figures[f"{name}.{key}"] = value
            table.add_row(key, f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
        Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(figures | {"machine": machine, "git_commit": git_commit()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
