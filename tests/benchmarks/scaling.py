"""How the rate of rollouts grows with the number of actors while each waits for a slow oracle, and what a batch costs."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.benchmarks.runs import command, environment

ORACLES = {250: ("quarter_second", (1, 2, 4, 8, 16, 32)), 50: ("fifty_milliseconds", (1, 2, 4, 8))}
"""Milliseconds of a batch -> oracle function of the tests, numbers of actors."""
BATCH_SIZE = 16
VALUES = {
    "run.name": "scaling", "run.num_learner_steps": 10**8, "run.save_every_seconds": 10_000, "run.max_seconds": 240,
    "actors.num_cpus": 0.05, "actors.learner_num_cpus": 0.2, "actors.batch_size": BATCH_SIZE, "learner.batch_size": 256,
    "oracle.name": "callable", "oracle.cache_size": 0,
    "replay.replay_share": 0, "network.hidden_size": 16, "network.num_layers": 1, "network.kmer_sizes": "[]",
    "objective.name": "tb", "evaluation.every_steps": 10**8, "evaluation.num_samples": 16, "evaluation.exact": "never",
    "tracking.log_every_steps": 1, "environment.length": 4,
}  # fmt: skip
ROLES = {"RolloutActor": "actor", "LearnerActor": "learner", "ReplayBufferActor": "buffer"}
WARM_UP_SECONDS = 4.0


def scaling(quick: bool) -> dict[str, float]:
    """Batches a second of up to 32 actors whose oracle takes 250 or 50 ms a batch, efficiency against one, CPU ms of a batch.

    Two batches are under way at each actor, and its oracle answers one at a time: at most 20 or 4 a second. Efficiency
    below one is the machine's: two cores have 2,000 ms a second for what a batch costs.
    """
    figures: dict[str, float] = {}
    for latency, (function, counts) in ORACLES.items():
        for count in (1, 4) if quick else counts:
            rate, cpu_ms = _measure(count, function, seconds=5 if quick else 12)
            print(f"{count} actors, {latency} ms: {rate:.1f} batches/s, CPU ms", cpu_ms, file=sys.stderr, flush=True)
            figures[f"batches_per_second_{latency}ms_{count}"] = rate
            figures[f"efficiency_{latency}ms_{count}"] = rate / (count * figures[f"batches_per_second_{latency}ms_1"])
            figures |= {f"{role}_cpu_ms_{latency}ms_{count}": spent for role, spent in cpu_ms.items()}
    return figures


def _measure(num_actors: int, function: str, seconds: float) -> tuple[float, dict[str, float]]:
    """Batches a second, and CPU milliseconds of a batch by role, once all actors are at work."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = VALUES | {"actors.num_rollout_actors": num_actors, "oracle.function": f"tests.oracles:{function}"}
        words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        with open(folder / "log", "w") as log:
            run = subprocess.Popen(command("run", *words), cwd=folder, env=environment(), stdout=log, stderr=log)
        try:
            while _num_oracles(run.pid) <= num_actors:  # one is the driver's own
                if run.poll() is not None:
                    raise RuntimeError((folder / "log").read_text())
                time.sleep(0.2)
            time.sleep(WARM_UP_SECONDS)
            before, cpu_before = _last(folder), _cpu_seconds(run.pid)
            time.sleep(seconds)
            after, cpu_after = _last(folder), _cpu_seconds(run.pid)
        finally:
            run.send_signal(signal.SIGINT)
            run.wait(120)
    batches = (after["num_sampled"] - before["num_sampled"]) / BATCH_SIZE
    rate = batches / (after["wall_seconds"] - before["wall_seconds"])
    return rate, {role: 1e3 * (cpu_after[role] - cpu_before[role]) / batches for role in cpu_before}


def _records(folder: Path) -> list[str]:
    file = folder / "runs" / "scaling" / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def _last(folder: Path) -> dict[str, float]:
    records = _records(folder)
    return json.loads(records[-1]) if records else {}


def _num_oracles(pid: int) -> int:
    """Oracle processes, which an actor starts when it is ready."""
    count = 0
    for process in psutil.Process(pid).children(recursive=True):
        try:
            count += "actors.oracles.callable_worker" in process.cmdline()
        except psutil.Error:
            continue
    return count


def _cpu_seconds(pid: int) -> Counter[str]:
    """CPU seconds so far of the driver, and of its actors with their oracles, by role; all else is Ray's own."""
    spent: Counter[str] = Counter()
    driver = psutil.Process(pid)
    for process in [driver, *driver.children(recursive=True)]:
        try:
            words, times = process.cmdline(), process.cpu_times()
        except psutil.Error:
            continue
        title = words[0] if words else ""
        role = next((role for name, role in ROLES.items() if title.startswith(f"ray::{name}")), "ray")
        if process.pid == pid:
            role = "driver"
        elif "actors.oracles.callable_worker" in words:
            role = "oracle"
        spent[role] += times.user + times.system
    return spent
