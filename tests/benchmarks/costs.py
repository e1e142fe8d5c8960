"""What the parts around the networks cost: buffer, broadcast, actors, start-up, and a step of masked diffusion."""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import psutil
import ray
import torch
from torch import nn

from actors.replay_buffer import ReplayBuffer, ReplayConfig
from actors.trajectories import TrajectoryBatch
from distributed.config import ExperimentConfig
from distributed.experiment import make_environment, make_policy
from distributed.ray_actors import RemoteRolloutActor
from distributed.ray_runtime import connect
from learner.drakes import exact
from learner.drakes.denoiser import Denoiser, DenoiserConfig, encode, frozen_copy
from learner.drakes.fine_tuning import RolloutConfig, reinforce_loss, rollout
from learner.drakes.pretraining import Pretrainer, PretrainingConfig
from tests.benchmarks.runs import command, environment
from tests.benchmarks.speed import NETWORK, beside, config, cpu_rates, trajectories

ROWS = 1024
LENGTH = 8


def buffer(quick: bool) -> dict[str, float]:
    """Trajectories stored and drawn a CPU second, in batches of 1,024, from a full buffer of 200,000.

    Drawn are as many by score as are fresh, and half as many for the dynamics model. The baseline is a deque of rows.
    """
    seconds = 0.3 if quick else 3.0
    batch = trajectories(config(dynamics=True), ROWS)
    ours = ReplayBuffer(ReplayConfig(replay_share=0.5, priority_exponent=3), LENGTH, seed=0)
    numbers = iter(range(10**9))

    def add() -> int:
        return ours.add(batch, "benchmark", next(numbers))

    def draw() -> int:
        ours.draw(ROWS, ROWS // 2)
        return ROWS + ROWS // 2

    rows: deque[tuple] = deque(maxlen=ours.config.capacity)

    def append() -> int:
        rows.extend(zip(*batch.arrays().values(), strict=True))
        return ROWS

    def choose() -> int:
        chosen = random.choices(rows, weights=[row[names.index("scores")] ** 3 for row in rows], k=ROWS)
        chosen += random.choices(rows, k=ROWS // 2)
        TrajectoryBatch(
            **{name: np.stack(values) for name, values in zip(names, zip(*chosen, strict=True), strict=True)}
        )
        return len(chosen)

    names = list(batch.arrays())
    while len(ours) < ours.config.capacity:
        add()
        append()
    return beside("added", add, append, seconds) | beside("drawn", draw, choose, seconds)


def actors(quick: bool) -> dict[str, float]:
    """Broadcasts of 3×2048 units to real actors, beside a copy in memory, and an actor's memory besides those weights.

    Weights go through the object store once; an actor maps them, and copies them into its network.
    """
    network = NETWORK | {"hidden_size": 512 if quick else 2048}
    settings, repeats = config(dynamics=True, network=network), 5 if quick else 20
    settings = settings.model_copy(update={"actors": settings.actors.model_copy(update={"batch_size": 1})})
    owns = connect(settings)
    try:
        weights = np.random.default_rng(0).random(_num_parameters(settings), dtype=np.float32)
        megabytes = weights.nbytes / 1e6
        start = time.perf_counter()
        for _ in range(repeats):
            weights.copy()
        copy = (time.perf_counter() - start) / repeats
        figures = {"broadcast_mb": megabytes, "copy_ms_per_mb": 1e3 * copy / megabytes}
        for count in (1, 2):
            handles = [RemoteRolloutActor.options(num_cpus=0.1).remote(settings, index, 0) for index in range(count)]
            pids = ray.get([handle.ready.remote() for handle in handles])
            seconds = _broadcast_seconds(handles, weights, repeats)
            figures[f"broadcast_ms_per_mb_{count}"] = 1e3 * seconds / megabytes
            figures[f"broadcast_to_copy_{count}"] = seconds / (copy * (count + 1))
            if count == 1:
                figures["actor_mb"] = psutil.Process(pids[0]).memory_full_info().uss / 1e6 - megabytes
                figures["torch_mb"] = _memory_of("import torch, numpy")
                figures["actor_to_torch_memory"] = figures["actor_mb"] / figures["torch_mb"]
            for handle in handles:
                ray.kill(handle)
    finally:
        if owns:
            ray.shutdown()
    return figures


def _num_parameters(settings: ExperimentConfig) -> int:
    return sum(p.numel() for p in make_policy(settings, make_environment(settings)).parameters())


def _broadcast_seconds(handles: list, weights: np.ndarray, repeats: int) -> float:
    """Wall seconds until all have new weights, less those of the same calls with weights that they already have."""

    def call(version: int, reference: ray.ObjectRef) -> float:
        start = time.perf_counter()
        ray.get([report for handle in handles for _, report in [handle.rollout.remote(reference, version)]])
        return time.perf_counter() - start

    spent = []
    for version in range(repeats):
        start = time.perf_counter()
        reference = ray.put(weights)
        put = time.perf_counter() - start
        spent.append(put + call(version, reference) - call(version, reference))
    return float(np.median(spent))


def _memory_of(code: str) -> float:
    """Unshared MB of a Python process that ran `code`."""
    words = f"{code}; import psutil; print(psutil.Process().memory_full_info().uss / 1e6)"
    return float(subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout)


def start_up(quick: bool) -> dict[str, float]:
    """Wall seconds from the command to its first learner step, beside `import torch`; and trained a second by 1 to 4 actors.

    The scores come from a table, so two cores are shared by actors and learner: more of them cannot be faster.
    """
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    imported = time.perf_counter() - start
    figures = {"import_torch_seconds": imported}
    for name, backend, count in [("serial", "serial", 1)] + [
        (f"ray_{n}", "ray", n) for n in ((1,) if quick else (1, 2, 4))
    ]:
        with tempfile.TemporaryDirectory() as folder:
            words = [
                "--run.name", name, "--run.backend", backend, "--actors.num_rollout_actors", str(count), "--actors.num_cpus",
                "0.1", "--actors.learner_num_cpus", "0.5", "--tracking.log_every_steps", "1", "--evaluation.exact", "never",
                "--evaluation.every_steps", "100000", "--run.num_learner_steps", "40" if quick else "400",
            ]  # fmt: skip
            started = time.time()
            subprocess.run(command("run", *words), cwd=folder, env=environment(), capture_output=True, check=True)
            lines = (Path(folder) / "runs" / name / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line) for line in lines if "trained_per_second" in line]
            summary = json.loads((Path(folder) / "runs" / name / "summary.json").read_text())
            ended = (Path(folder) / "runs" / name / "summary.json").stat().st_mtime
            figures[f"start_up_seconds_{name}"] = ended - started - summary["wall_seconds"] + steps[0]["wall_seconds"]
            figures[f"start_up_to_import_{name}"] = figures[f"start_up_seconds_{name}"] / imported
            figures[f"trained_per_second_{name}"] = steps[-1]["trained_per_second"]
            if backend == "ray":
                figures[f"ray_to_serial_{count}"] = (
                    steps[-1]["trained_per_second"] / figures["trained_per_second_serial"]
                )
                figures[f"learner_utilisation_{count}"] = steps[-1]["learner_utilisation"]
    return figures


def drakes_steps(quick: bool) -> dict[str, float]:
    """CPU ms of a step of masked diffusion on 8-mers (64 units, 2 layers), beside PyTorch's encoder and plain loops."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds = 0.3 if quick else 5.0
    shape = DenoiserConfig(hidden_size=64, num_layers=2, num_heads=4)
    data = exact.all_strings(4, LENGTH)
    model = Denoiser(4, LENGTH, shape)
    plain = PlainDenoiser(64, 2, 4)
    pretrained, reference = frozen_copy(model), frozen_copy(plain)
    pretrainer = Pretrainer(model, PretrainingConfig(num_steps=10**6, batch_size=256))
    optimiser = torch.optim.Adam(plain.parameters(), foreach=False)

    def pretrain() -> int:
        pretrainer.step(pretrainer.draw(data))
        return 1

    def plain_pretrain() -> int:
        tokens = data[torch.randint(len(data), (256,))]
        masked = torch.rand(tokens.shape) < torch.rand(256, 1).clamp(min=0.05)
        log_probs = plain(encode(torch.where(masked, 4, tokens), 4)).log_softmax(-1)
        optimiser.zero_grad()
        (-(log_probs.gather(-1, tokens[..., None])[..., 0] * masked).sum() / 256).backward()
        optimiser.step()
        return 1

    def fine_tune() -> int:
        drawn = rollout(model, pretrained, 128, RolloutConfig(num_steps=LENGTH, estimator="reinforce"))
        reinforce_loss(drawn, torch.rand(128), 0.05).backward()
        return 1

    def plain_fine_tune() -> int:
        log_prob, log_ratio, tokens = torch.zeros(128), torch.zeros(128), torch.full((128, LENGTH), 4)
        for position in torch.randperm(LENGTH):
            states = encode(tokens, 4)
            here, there = plain(states).log_softmax(-1), reference(states).log_softmax(-1)
            tokens = tokens.clone()
            tokens[:, position] = torch.multinomial(here[:, position].exp().detach(), 1)[:, 0]
            log_prob = log_prob + here[:, position].gather(-1, tokens[:, position, None])[:, 0]
            log_ratio += (here - there)[:, position].gather(-1, tokens[:, position, None])[:, 0].detach()
        values = torch.rand(128) - 0.05 * log_ratio
        (-(values - values.mean()) * log_prob).mean().backward()
        return 1

    figures = {}
    for name, ours, theirs in (("pretraining", pretrain, plain_pretrain), ("fine_tuning", fine_tune, plain_fine_tune)):
        ms, baseline = (1e3 / rate for rate in cpu_rates([ours, theirs], seconds))
        figures |= {f"{name}_ms": ms, f"{name}_baseline_ms": baseline, f"{name}_ratio": baseline / ms}
    return figures


class PlainDenoiser(nn.Module):
    """Logits [B, L, 4] of states [B, L, 5] by PyTorch's own encoder."""

    def __init__(self, hidden: int, layers: int, heads: int):
        super().__init__()
        self.embedding, self.head = nn.Linear(5, hidden), nn.Linear(hidden, 4)
        self.positions = nn.Parameter(torch.randn(LENGTH, hidden) * 0.5)
        layer = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.encoder(self.embedding(states) + self.positions))
