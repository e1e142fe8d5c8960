"""Judging a sampler from samples: the same weights as judged exactly, thoughts, and what becomes of rejected scores.

The samples are drawn with fixed seeds. Intervals are 95%, widened by half their width on either side, which about 1 in
5,000 seeds would miss for each figure; of 50 seeds, none came near that.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.environments.sequence import SequenceEnvironment
from distributed.config import DEFAULT_CONFIG, ConfigError, ExperimentConfig, load_config
from distributed.evaluation import Evaluator
from distributed.experiment import make_environment, make_oracle, make_policy
from distributed.run import main, newest_readable, train
from distributed.run_folder import RunFolder
from learner import exact, sampled
from learner.dynamics import DynamicsModel
from learner.flat import FlatParameters
from learner.gflownet import EvaluationWeights
from learner.networks.prefixes import num_symbols
from tests.reference import brute_force_law, randomise

SMALL = [("network.hidden_size", "16"), ("dynamics.network.hidden_size", "8"), ("evaluation.num_samples", "4096")]
TRANSFORMER = [("network.name", "transformer"), ("network.hidden_size", "16"), ("network.num_heads", "2")]
THOUGHTS = [*TRANSFORMER, ("network.thought_context", "true")]
ESTIMATES = ["sampled_tv", "sampled_reverse_kl", "log_z_estimate", "target_mean_score_estimate"]


def evaluator_of(config: ExperimentConfig) -> Evaluator:
    environment = make_environment(config)
    return Evaluator(config, environment, make_oracle(config, environment))


def tfbind8(*overrides: tuple[str, str]) -> ExperimentConfig:
    return load_config(DEFAULT_CONFIG, [*SMALL, *overrides])


def random_weights(config: ExperimentConfig, environment: SequenceEnvironment, limit: float) -> EvaluationWeights:
    """Random networks, whose outputs at a thousand random prefixes reach `limit` and no further: no heavy tails."""
    policy, dynamics = make_policy(config, environment), DynamicsModel(environment.space, config.dynamics.network)
    for seed, model in enumerate((policy, dynamics)):
        randomise(model, seed=seed)
        space = environment.space
        size = num_symbols(space.num_tokens, model.thought_context)
        symbols = torch.from_numpy(np.random.default_rng(0).integers(size, size=(1000, space.max_length)))
        rows = torch.from_numpy(np.random.default_rng(1).integers(1000 * (space.max_length + 1), size=1000))
        with torch.no_grad():
            factor = limit / model.network(symbols, rows).abs().max()
            model.network.head.weight *= factor
            model.network.head.bias *= factor
    vectors = [FlatParameters(model).vector.detach().numpy().copy() for model in (policy, dynamics)]
    return EvaluationWeights(7, *vectors)


def assert_roughly_covered(metrics: dict[str, float], name: str, value: float) -> None:
    low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
    assert low < high
    assert low <= metrics[name] <= high, f"{name}: the interval misses its own estimate"
    slack = 0.5 * (high - low)
    assert low - slack <= value <= high + slack, f"{name}: {value} is not in {low}..{high}"


@pytest.mark.parametrize("network", [[], TRANSFORMER], ids=["mlp", "transformer"])
def test_samples_say_of_tfbind8_what_the_exact_law_says(network: list[tuple[str, str]]):
    exactly, by_samples = (tfbind8(*network, ("evaluation.exact", how)) for how in ("always", "never"))
    judge, other = evaluator_of(exactly), evaluator_of(by_samples)
    assert judge.is_exact
    assert not other.is_exact
    weights = random_weights(exactly, judge.environment, limit=0.5)
    truth, law = judge.exact_metrics(weights)
    metrics, samples = other.sample_metrics(weights)
    assert metrics["effective_sample_fraction"] > 0.15, "too heavy tails to test with"
    log_z = float(judge.policy.at(judge.policy.start()).log_flow.detach()) - truth["log_z_error"]
    assert_roughly_covered(metrics, "sampled_tv", truth["exact_tv"])
    assert_roughly_covered(metrics, "sampled_reverse_kl", exact.kl_divergence(law.law, law.target))
    assert_roughly_covered(metrics, "log_z_estimate", log_z)
    assert_roughly_covered(metrics, "target_mean_score_estimate", truth["target_mean_score"])
    assert metrics["log_z_error"] == pytest.approx(truth["log_z_error"] - (metrics["log_z_estimate"] - log_z), abs=1e-4)
    assert abs(metrics["mean_score"] - truth["exact_mean_score"]) < 4 * metrics["mean_score_error"]
    tokens, lengths = judge.environment.space.enumerate()  # 64 3-mers; the largest error of 60 seeds was .018
    kmers = [sampled.kmer_frequencies(tokens, lengths, shares, 4, 3) for shares in (law.law, law.target)]
    assert metrics["kmer_tv"] == pytest.approx(
        exact.total_variation(*kmers), abs=0.03
    )  # 64 cells; of 60 seeds, the largest error was .018
    assert samples.target_weights is not None
    assert samples.target_weights.sum() == pytest.approx(1)
    assert len(samples.target_weights) == len(samples.trajectories) == 4096
    assert "exact_tv" not in metrics
    assert judge.sample_metrics(weights)[1].target_weights is None
    assert "sampled_tv" not in judge.sample_metrics(weights)[0]


def test_samples_are_judged_with_the_same_numbers_each_time():
    config = tfbind8(("evaluation.exact", "never"), ("evaluation.num_samples", "200"))
    first, second = evaluator_of(config), evaluator_of(config)
    weights = random_weights(config, first.environment, 0.5)
    expected = first.sample_metrics(weights)[0]
    assert first.sample_metrics(weights)[0] == second.sample_metrics(weights)[0] == expected
    assert first.interim(weights) == expected


@pytest.mark.parametrize("variable", [{}, {"environment.variable_length": True, "environment.min_length": 1}], ids=str)
def test_samples_say_of_a_toy_what_the_exact_law_says(toy, variable):
    sizes = {"evaluation.num_samples": 4000, "evaluation.kmer_size": 2} | variable
    judge, other = (evaluator_of(toy(**sizes, **{"evaluation.exact": how})) for how in ("always", "never"))
    weights = random_weights(judge.config, judge.environment, 0.5)
    truth, law = judge.exact_metrics(weights)
    metrics, _ = other.sample_metrics(weights)
    for evaluator in (judge, other):
        evaluator.oracle.close()
    assert_roughly_covered(metrics, "sampled_tv", truth["exact_tv"])
    assert_roughly_covered(metrics, "sampled_reverse_kl", exact.kl_divergence(law.law, law.target))
    assert_roughly_covered(metrics, "target_mean_score_estimate", truth["target_mean_score"])
    assert metrics["log_z_error"] == pytest.approx(truth["log_z_error"], abs=0.1)
    tokens, lengths = judge.environment.space.enumerate()
    kmers = [sampled.kmer_frequencies(tokens, lengths, shares, 2, 2) for shares in (law.law, law.target)]
    assert metrics["kmer_tv"] == pytest.approx(exact.total_variation(*kmers), abs=0.04)


def test_samples_and_exact_law_agree_on_rejected_scores(toy):
    """The target gives nothing to a sequence whose score is rejected; the sampler's mass there is a distance."""
    changes = {"oracle.function": "tests.oracles:nan_for_aaa", "evaluation.num_samples": 4000}
    judge, other = (evaluator_of(toy(**changes, **{"evaluation.exact": how})) for how in ("always", "never"))
    weights = random_weights(judge.config, judge.environment, 0.3)
    truth, _ = judge.exact_metrics(weights)
    metrics, _ = other.sample_metrics(weights)
    for evaluator in (judge, other):
        evaluator.oracle.close()
    assert metrics["num_rejected_samples"] > 300
    assert metrics["log_z_error"] == pytest.approx(truth["log_z_error"], abs=0.03)
    assert_roughly_covered(metrics, "sampled_tv", truth["exact_tv"])


# --- thoughts ---------------------------------------------------------------------------------------------------------


def test_thoughts_with_an_exact_law_are_a_config_error_before_anything_starts(in_tmp_path):
    overrides = [part for key, value in (*THOUGHTS, ("evaluation.exact", "always")) for part in (f"--{key}", value)]
    with pytest.raises(ConfigError, match=r"evaluation\.exact: got 'always'.*thought_context.*allowed: auto, never"):
        main(["--run.name", "x", *overrides])
    assert not Path("runs").exists()


@pytest.mark.parametrize("how", ["auto", "never"])
def test_thoughts_are_judged_by_samples(how: str):
    config = tfbind8(*THOUGHTS, ("evaluation.exact", how))
    judge = evaluator_of(config)
    assert not judge.is_exact
    weights = random_weights(config, judge.environment, 0.5)
    metrics, samples = judge.sample_metrics(weights)
    assert {f"{name}{end}" for name in ESTIMATES for end in ("", "_low", "_high")} <= metrics.keys()
    assert {"kmer_tv", "log_z_error", "effective_sample_fraction", "mean_score", "num_modes"} <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert "exact_tv" not in judge.interim(weights)
    tokens, lengths = judge.environment.space.enumerate()
    log_rewards = 3 * np.log(np.maximum(judge.oracle.score(tokens, lengths).astype(np.float64), 1e-3))
    log_z = np.log(np.exp(log_rewards).sum())
    assert_roughly_covered(metrics, "log_z_estimate", log_z)
    assert samples.trajectories.actions.shape == (4096, 8)


def test_untrained_thoughts_are_as_far_from_the_target_as_the_uniform_law():
    """Without an influence of thoughts, the bound is the distance itself."""
    config = tfbind8(*THOUGHTS)
    judge = evaluator_of(config)
    weights = random_weights(config, judge.environment, 0.0)
    metrics, _ = judge.sample_metrics(weights)
    plain = evaluator_of(tfbind8(*TRANSFORMER))
    truth, law = plain.exact_metrics(random_weights(plain.config, plain.environment, 0.0))
    np.testing.assert_allclose(law.law, 4.0**-8, rtol=1e-5)
    assert_roughly_covered(metrics, "sampled_tv", truth["exact_tv"])


def test_dynamics_with_thoughts_leave_the_exact_law_but_not_their_own_error(toy):
    thoughts = {f"dynamics.{key}": True if value == "true" else value for key, value in THOUGHTS}
    thoughts |= {"dynamics.network.hidden_size": 16, "dynamics.network.num_heads": 2}
    config = toy(**thoughts)
    judge = evaluator_of(config)
    assert judge.is_exact
    metrics, law = judge.exact_metrics(random_weights(config, judge.environment, 1.0))
    judge.oracle.close()
    assert "exact_tv" in metrics
    assert "dynamics_tv" not in metrics
    tables = exact.policy_tables(judge.policy)
    walked = brute_force_law(judge.environment.space, tables, judge.environment.kernel)
    np.testing.assert_allclose(law.law, list(walked.values()), atol=1e-6)


@pytest.mark.parametrize("dynamics_too", [False, True])
def test_a_whole_run_with_thoughts(in_tmp_path, toy, dynamics_too):
    """Trained, saved, resumed and judged like any other."""
    sections = ["network", "dynamics.network"] if dynamics_too else ["network"]
    changes = {"evaluation.exact": "auto", "run.num_learner_steps": 12}
    for section in sections:
        changes |= {
            f"{section}.name": "transformer", f"{section}.hidden_size": 8, f"{section}.num_heads": 2,
            f"{section}.num_layers": 1, f"{section}.thought_context": True,
        }  # fmt: skip
    config = toy(**changes)
    folder = RunFolder(config.run.output_folder / config.run.name)
    assert train(config, None, None, None) == 0
    result = json.loads(folder.summary_file.read_text())
    assert result["status"] == "done"
    assert np.isfinite([result[name] for name in ("sampled_tv", "log_z_estimate", "kmer_tv", "log_z_error")]).all()
    assert "exact_tv" not in result
    longer = folder.load_config([("run.num_learner_steps", "18")])
    assert longer.network == config.network
    assert train(longer, folder, *newest_readable(folder, longer)) == 0
    assert json.loads(folder.summary_file.read_text())["num_learner_steps"] == 18
