"""What a sweep costs besides its trials, and whether that grows with their number."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from mlflow.tracking import MlflowClient

from tests.conftest import TOY

ROOT = Path(__file__).parents[2]
CONCURRENT = 2
TRIAL = re.compile(r"ray::(Trial|ResourceTrainable)")


def sweep_overhead(quick: bool) -> dict[str, float]:
    """Many short trials, two at a time, on a toy task: their first quarter beside their last.

    `overhead`: wall seconds of a place for a trial, less those of the run in it. `mlflow`: from the trial's summary
    to the end of its MLflow run. Memory is resident, in MB.
    """
    num_trials = 8 if quick else 64
    section = {
        "space": {"reward.exponent": {"uniform": [1, 3]}, "objective.subtb_decay": {"uniform": [0.5, 1.5]}},
        "num_samples": num_trials,
        "max_concurrent": CONCURRENT,
    }
    config = TOY | {"sweep": section, "tracking": {"log_every_steps": 4}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sweep.yaml").write_text(yaml.safe_dump(config))
        start = time.time()
        memory = _run(folder)
        ends = _ends(folder)
        seconds = time.time() - start
    if len(ends) != num_trials:
        raise RuntimeError(f"{len(ends)} of {num_trials} trials were done")
    quarter = num_trials // 4
    figures = {
        "num_trials": num_trials,
        "wall_seconds": seconds,
        "startup_seconds": ends[0][0] - ends[0][1] - start,
    }
    for part, chosen in (("first", slice(0, quarter + 1)), ("last", slice(-quarter - 1, None))):
        shown = ends[chosen]
        each = CONCURRENT * (shown[-1][0] - shown[0][0]) / (len(shown) - 1)
        figures |= {
            f"overhead_seconds_{part}_quarter": each - statistics.mean(end[1] for end in shown[1:]),
            f"mlflow_seconds_{part}_quarter": statistics.mean(end[2] for end in shown[1:]),
        }
    for kind, samples in memory.items():
        size = max(1, len(samples) // 4)
        figures |= {f"{kind}_mb_first_quarter": max(samples[:size]), f"{kind}_mb_last_quarter": max(samples[-size:])}
    return figures


def _run(folder: Path) -> dict[str, list[float]]:
    """Run the sweep in `folder`; the memory of its driver and of its largest trial process, twice a second."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "distributed.sweep", "sweep.yaml"]
    memory: dict[str, list[float]] = {"driver": [], "trial": []}
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            driver, trials = 0.0, [0.0]
            try:
                root = psutil.Process(process.pid)
                driver = root.memory_info().rss / 1e6
                for child in root.children(recursive=True):
                    if TRIAL.search(" ".join(child.cmdline())):
                        trials.append(child.memory_info().rss / 1e6)
            except psutil.Error:
                continue
            if max(trials) > 0:
                memory["driver"].append(driver)
                memory["trial"].append(max(trials))
            time.sleep(0.5)
    if process.returncode != 0:
        raise RuntimeError((folder / "log.txt").read_text()[-3000:])
    return memory


def _ends(folder: Path) -> list[tuple[float, float, float]]:
    """Of each trial that is done, in order: when it ended, its wall seconds, and MLflow's seconds after its summary."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("default").experiment_id
    runs = {run.info.run_name: run.info.end_time / 1000 for run in client.search_runs([experiment])}
    ends = []
    for file in (folder / "runs" / "toy" / "trials").glob("*/summary.json"):
        summary, written = json.loads(file.read_text()), file.stat().st_mtime
        if summary["status"] == "done":
            ends.append((runs[file.parts[-2]], summary["wall_seconds"], runs[file.parts[-2]] - written))
    return sorted(ends)
