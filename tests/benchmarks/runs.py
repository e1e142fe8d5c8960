"""Whole runs of the command: quality of the default task, and what Ray costs beside the serial backend."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def command(name: str, *arguments: str) -> list[str]:
    """`python -m distributed.NAME` without MLflow."""
    return [sys.executable, "-m", f"distributed.{name}", "--tracking.mlflow", "false", *arguments]


def environment() -> dict[str, str]:
    """In which a command finds this program and its test oracles from any folder."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}


def run(name: str, *arguments: str, folder: str) -> dict:
    """`python -m distributed.run` in `folder`; its summary."""
    words = command("run", "--run.name", name, *arguments)
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment())
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads((Path(folder) / "runs" / name / "summary.json").read_text())


def quality(quick: bool) -> dict[str, float]:
    """The default run, three seeds: each figure's worst and median."""
    extra = ["--run.num_learner_steps", "400"] if quick else []
    with tempfile.TemporaryDirectory() as folder:
        results = [
            run(f"seed{seed}", "--run.seed", str(seed), *extra, folder=folder) for seed in range(1 if quick else 3)
        ]
    return worst_and_median(
        results,
        low="exact_tv excess_kl wall_seconds cpu_seconds",
        high="mean_score top100_mean num_modes num_trajectories",
    )


def worst_and_median(results: list[dict], *, low: str, high: str) -> dict[str, float]:
    """Of several summaries: the figures named in `low` are better the lower, those in `high` the higher."""
    figures = {}
    for names, worst in ((low, max), (high, min)):
        for name in names.split():
            values = [result[name] for result in results]
            figures |= {f"{name}_median": statistics.median(values), f"{name}_worst": worst(values)}
    return figures


def ray_overhead(quick: bool) -> dict[str, float]:
    """Trajectories a second of Ray with one rollout actor and of the serial backend, same work, rollouts dominating.

    The oracle answers after 20 ms for every 256 sequences, and the learner is small.
    """
    arguments = [
        "--oracle.name", "callable", "--oracle.function", "tests.oracles:slow", "--oracle.cache_size", "0",
        "--evaluation.exact", "never", "--evaluation.num_samples", "256", "--network.hidden_size", "32",
        "--network.num_layers", "2", "--network.kmer_sizes", "[]", "--learner.batch_size", "1024",
        "--dynamics.batch_size", "64", "--evaluation.every_steps", "100000", "--run.save_every_seconds", "1000",
        "--run.num_learner_steps", "60" if quick else "300",
    ]  # fmt: skip
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("serial", "ray"):
            run(backend, "--run.backend", backend, *arguments, folder=folder)
            lines = (Path(folder) / "runs" / backend / "metrics.jsonl").read_text().splitlines()
            rates[backend] = [json.loads(line) for line in lines if "trained_per_second" in line][-1]
    serial, ray = (rates[backend]["trained_per_second"] for backend in ("serial", "ray"))
    return {"serial_per_second": serial, "ray_per_second": ray, "ray_to_serial": ray / serial}
