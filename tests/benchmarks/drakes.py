"""DRAKES: how near a pretrained denoiser comes to its data, and a fine-tuned one to the optimum, by exact figures."""

import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from actors.oracles.tfbind8 import SHIPPED_FACTOR, e_score_table
from learner.drakes import exact
from learner.drakes.denoiser import Denoiser, DenoiserConfig
from learner.drakes.pretraining import Pretrainer, PretrainingConfig
from tests.benchmarks.runs import run, worst_and_median

LENGTH = 8
NETWORK = DenoiserConfig(hidden_size=64, num_layers=2, num_heads=4, stem_kernel=15)
PRETRAINING = {
    "batch_size": 256,
    "learning_rate": 4e-3,
    "average_decay": 0.998,
    "estimator": "harmonic",
}
NUM_STEPS = 6000
"""37 to 47 ms of CPU each on a shared core: within five minutes."""

SMALLEST_ALPHA = 1e-9


def lower_half() -> torch.Tensor:
    """bool [65536]: the 8-mers whose score is at most the median."""
    scores = torch.from_numpy(e_score_table(SHIPPED_FACTOR).astype(np.float64))
    return scores <= scores.median()


def pretraining(quick: bool) -> dict[str, float]:
    """Exact figures, in nats a sequence, of the averaged weights on the sequences they were trained on.

    They are no measure of generalisation: a model that knows its training set by heart has the NLL log n.
    """
    torch.manual_seed(0)
    kept, num_steps = lower_half(), 30 if quick else NUM_STEPS
    data = exact.all_strings(4, LENGTH)[kept]
    trainer = Pretrainer(Denoiser(4, LENGTH, NETWORK), PretrainingConfig(num_steps=num_steps, **PRETRAINING))
    figures: dict[str, float] = {"data_entropy": float(np.log(len(data)))}
    seconds = 0.0
    for start, end in pairwise([0, num_steps // 6, num_steps // 2, num_steps]):
        begun = time.process_time()
        for _ in range(start, end):
            trainer.step(trainer.draw(data))
        seconds += time.process_time() - begun
        with torch.no_grad():
            table = exact.log_prob_table(trainer.averaged_denoiser())
        law = exact.any_order_law(table)
        figures |= {f"cpu_seconds_{end}": seconds, f"nll_{end}": float(-law[kept].log().mean())}
    symmetric = exact.any_order_law(exact.of_both_strands(table))
    return figures | {
        "ms_a_step": 1e3 * seconds / num_steps,
        "nll_of_both_strands": float(-symmetric[kept].log().mean()),
        "nelbo": float(exact.nelbo_of_all(table)[kept].mean()),
        "mass_on_data": float(law[kept].sum()),
        "model_entropy": float(-(law * law.log()).sum()),
    }


def tfbind8(quick: bool) -> dict[str, float]:
    """The shipped experiment on one core, three seeds; then once without the KL, which must collapse."""
    config = str(Path(__file__).parents[2] / "tune_configs" / "drakes_tfbind8.yaml")
    words = [config, "--run.backend", "serial"]
    if quick:
        words += ["--generator.pretraining.num_steps", "20", "--run.num_learner_steps", "40"]
    without = [f"--generator.alpha.{name}={SMALLEST_ALPHA}" for name in ("initial", "minimum")]
    with tempfile.TemporaryDirectory() as folder:
        results = [
            run(f"seed{seed}", *words, "--run.seed", str(seed), folder=folder) for seed in range(1 if quick else 3)
        ]
        collapsed = run("without_kl", *words, *without, folder=folder)
    for result in results:
        result["share_of_j_star"] = result["objective_j"] / result["objective_j_star"]
    names = ("exact_mean_score", "path_kl", "entropy", "objective_j", "gc_rmse", "likelihood_z")
    return worst_and_median(
        results,
        low="pretrained_nll exact_nll path_kl cpu_seconds gc_rmse",
        high="pretrained_mean_score exact_mean_score objective_j objective_j_star share_of_j_star entropy kmer_correlation",
    ) | {f"{name}_without_kl": collapsed[name] for name in names}


def motifs(quick: bool) -> dict[str, float]:
    """The shipped experiment on regulatory DNA of known law on one core, three seeds."""
    config = str(Path(__file__).parents[2] / "tune_configs" / "drakes_motifs.yaml")
    words = [config, "--run.backend", "serial"]
    if quick:
        words += ["--generator.pretraining.num_steps", "20", "--run.num_learner_steps", "24"]
    with tempfile.TemporaryDirectory() as folder:
        results = [
            run(f"seed{seed}", *words, "--run.seed", str(seed), folder=folder) for seed in range(1 if quick else 3)
        ]
    for result in results:
        result["excess_nelbo"] = result["pretrained_nelbo"] - result["data_entropy"]
        result["true_log_prob_distance"] = abs(result["true_log_prob_z"])
    return worst_and_median(
        results,
        low="pretrained_nelbo data_entropy excess_nelbo gc_rmse true_log_prob_distance cpu_seconds",
        high="mean_score kmer_correlation mean_hamming nearest_hamming unique_fraction",
    )
