"""Runs that end before their last step, and runs that start from trained weights."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from distributed.api import load, train
from distributed.checkpoints import load_sampler
from distributed.config import ConfigError
from distributed.experiment import make_learner
from distributed.run import main, train_in_folder
from distributed.run import train as run_command
from distributed.run_folder import RunFolder
from distributed.stopping import StopWhenConfig
from tests.conftest import TOY


@pytest.mark.parametrize(
    ("changes", "reason", "steps"),
    [
        ({}, "run.num_learner_steps: all 24 are taken", 24),
        ({"run.stop_when.metric": "exact_tv", "run.stop_when.below": 0.99}, "exact_tv .* is below 0.99 at step 8", 10),
        ({"run.stop_when.metric": "exact_tv", "run.stop_when.below": 1e-9}, "all 24 are taken", 24),
        ({"run.stop_when.metric": "exact_mean_score", "run.stop_when.above": 0.1}, "exact_mean_score .* is above 0.1", 10),
        ({"run.max_oracle_calls": 200}, "run.max_oracle_calls: 256 sequences are scored", 8),
        ({"run.max_seconds": 1e-6}, "run.max_seconds: 1e-06 are over", 0),
    ],
)  # fmt: skip
def test_a_run_ends_cleanly_and_says_why(in_tmp_path, toy, changes, reason, steps):
    assert run_command(toy(**changes), None, None, None) == 0
    folder = RunFolder(Path("runs/toy"))
    summary = folder.read_summary()
    assert (summary["status"], summary["num_learner_steps"]) == ("done", steps)
    assert re.search(reason, summary["stop_reason"])
    assert summary["stop_reason"] in folder.report_file.read_text()
    assert "excess_kl" in summary
    assert load_sampler(folder.path)[1].step == steps


def test_a_metric_that_evaluations_do_not_have_ends_the_run_with_those_they_have(in_tmp_path, toy):
    changes = {"run.stop_when.metric": "exact_tvv", "run.stop_when.below": 0.1}
    assert run_command(toy(**changes), None, None, None) == 1
    summary = json.loads(Path("runs/toy/summary.json").read_text())
    assert "have no 'exact_tvv'; they have " in summary["error"]
    assert "exact_tv, " in summary["error"]


@pytest.mark.parametrize(
    "given",
    [{"metric": "excess_kl"}, {"below": 1.0}, {"metric": "excess_kl", "below": 1.0, "above": 0.0}],
)
def test_a_half_said_end_is_refused(toy, given):
    with pytest.raises(ConfigError, match=r"run\.stop_when: metric goes with either below or above"):
        toy(**{f"run.stop_when.{key}": value for key, value in given.items()})


def test_limits_are_not_reached_at_their_value():
    config = StopWhenConfig(metric="excess_kl", below=0.5)
    assert config.reason(1, {"excess_kl": 0.5}) is None
    assert config.reason(1, {"excess_kl": float("nan")}) is None
    assert config.reason(1, {"excess_kl": 0.4999}) == "run.stop_when: excess_kl 0.4999 is below 0.5 at step 1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        return train(TOY, run={"num_learner_steps": 200}).folder.absolute()


@pytest.mark.parametrize("form", ["folder", "checkpoint", "export"])
def test_a_run_starts_from_weights_with_a_fresh_optimiser(in_tmp_path, toy, trained, form):
    path = {
        "folder": lambda: trained,
        "checkpoint": lambda: RunFolder(trained).checkpoints.newest_first()[0],
        "export": lambda: load(trained).export("exported"),
    }[form]()
    config = toy(**{"run.start_from": str(path), "run.max_seconds": 1e-6, "environment.noise": 0.3})
    train_in_folder(config, None, None, None)
    ours, theirs = load_sampler(Path("runs/toy"))[1], load_sampler(trained)[1]
    assert (ours.step, theirs.step) == (0, 200)
    assert np.array_equal(ours.policy, theirs.policy)
    assert np.array_equal(ours.dynamics, theirs.dynamics)


def test_a_warm_start_begins_where_the_other_run_ended(in_tmp_path, toy, trained):
    train(toy(**{"run.start_from": str(trained), "run.num_learner_steps": 2, "evaluation.every_steps": 2}))
    cold = train(toy(**{"run.name": "cold", "run.num_learner_steps": 2}))
    warm = load("runs/toy")
    assert warm.summary["excess_kl"] < 0.5 * cold.summary["excess_kl"]
    assert warm.summary["num_learner_steps"] == 2
    # log F of the root is not moved to the scale of the reward a second time
    assert abs(warm.summary["log_z_error"]) < abs(load(trained).summary["log_z_error"]) + 0.1


def test_a_resumed_run_needs_the_weights_it_started_from_no_more(in_tmp_path, toy, trained):
    exported = load(trained).export("exported")
    train(toy(**{"run.start_from": str(exported), "run.max_seconds": 1e-6}))
    for file in exported.iterdir():
        file.unlink()
    run = train(resume="runs/toy", run={"max_seconds": None})
    assert run.summary["num_learner_steps"] == 24
    assert abs(run.summary["log_z_error"]) < abs(load(trained).summary["log_z_error"]) + 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network.hidden_size": 17}, r"network\.hidden_size is 17 here and 16 there"),
        ({"environment.alphabet": "BA"}, r"environment\.alphabet is BA here and AB there"),
        ({"objective.backward": "learned"}, r"backward_head \(objective\) is True here"),
        ({"run.start_from": "nowhere"}, r"run\.start_from: .*neither a run folder"),
    ],
)
def test_weights_of_other_networks_are_refused_before_anything_is_made(in_tmp_path, toy, trained, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_command(toy(**{"run.start_from": str(trained), **changes}), None, None, None)
    assert not Path("runs").exists()


def test_the_command_takes_both(in_tmp_path, trained):
    (in_tmp_path / "toy.yaml").write_text(json.dumps(TOY))
    arguments = ["--run.start_from", str(trained), "--run.stop_when.metric", "exact_tv", "--run.stop_when.below", "0.9"]
    assert main(["toy.yaml", *arguments]) == 0
    assert "exact_tv" in RunFolder(Path("runs/toy")).read_summary()["stop_reason"]


def test_a_warm_learner_stays_warm_in_its_state(toy, trained):
    learner, other = make_learner(toy()), make_learner(toy())
    learner.start_from(load_sampler(trained)[1])
    other.load_state_dict(learner.state_dict())
    assert other.state_dict()["is_warm"] is True
