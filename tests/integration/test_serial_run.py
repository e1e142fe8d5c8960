"""Whole runs in one process."""

import json
from pathlib import Path

import numpy as np
import pytest

from distributed.checkpoints import load_sampler
from distributed.config import ConfigError, ExperimentConfig
from distributed.experiment import derive_seed
from distributed.run import main, newest_readable, train
from distributed.run_folder import RunFolder
from distributed.training_loop import TrainingLoop


def run(config: ExperimentConfig) -> tuple[int, RunFolder]:
    folder = RunFolder(config.run.output_folder / config.run.name)
    return train(config, None, None, None), folder


def resume(folder: RunFolder, **changes: object) -> int:
    config = folder.load_config([(key, str(value)) for key, value in changes.items()])
    return train(config, folder, *newest_readable(folder, config))


def summary(folder: RunFolder) -> dict:
    return json.loads(folder.summary_file.read_text())


def test_a_run_leaves_a_complete_folder(in_tmp_path, toy, capsys):
    code, folder = run(toy())
    assert code == 0
    result = summary(folder)
    wanted = {
        "exact_tv", "exact_kl", "kl_floor", "excess_kl", "mean_score", "top100_mean", "num_modes", "num_trajectories",
        "trajectories_per_second", "num_learner_steps", "wall_seconds", "cpu_seconds", "seed", "git_commit",
    }  # fmt: skip
    assert wanted <= result.keys()
    assert result["status"] == "done"
    assert result["num_sampled"] == result["num_stored"] + result["num_dropped"] + result["num_in_flight"] == 12 * 64
    seeds = {"learner": derive_seed(0, "learner"), "replay": derive_seed(0, "replay")}
    assert result["seeds"] == seeds | {"rollout-0.0": derive_seed(0, "rollout", 0, 0)}
    assert {p.name for p in folder.plots.glob("*.png")} >= {"learning_curves.png", "probability_scatter.png"}
    steps = [record["step"] for record in folder.read_metrics() if "loss" in record]
    assert steps == sorted(set(steps))
    assert steps
    assert "exact_tv" in capsys.readouterr().out


def test_two_runs_of_one_seed_are_equal_to_the_bit_and_another_seed_differs(in_tmp_path, toy):
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        _, folder = run(toy(**{"run.name": name, "run.seed": seed}))
        weights.append(load_sampler(folder.path)[1].policy)
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


def test_a_resumed_run_is_equal_to_the_bit(in_tmp_path, toy, monkeypatch):
    """Stopped half-way and continued = never stopped: weights, optimiser, buffer, generators, counters, metrics."""
    changes = {"replay.replay_share": 0.25, "replay.priority_exponent": 1.0}
    _, whole = run(toy(**changes, **{"run.name": "whole"}))
    monkeypatch.setattr(TrainingLoop, "_out_of_time", lambda loop: loop.step >= 12)
    _, halves = run(toy(**changes, **{"run.name": "halves"}))
    monkeypatch.undo()
    monkeypatch.chdir(in_tmp_path)
    assert summary(halves)["num_learner_steps"] == 12
    assert resume(halves) == 0
    first, second = load_sampler(whole.path)[1], load_sampler(halves.path)[1]
    assert np.array_equal(first.policy, second.policy)
    assert np.array_equal(first.dynamics, second.dynamics)
    for key in ("exact_tv", "mean_score", "num_trajectories", "num_stored", "policy_version"):
        assert summary(whole)[key] == summary(halves)[key]
    whole_curve, halves_curve = (
        [(r["step"], r["loss"]) for r in f.read_metrics() if "loss" in r] for f in (whole, halves)
    )
    assert dict(whole_curve[-3:]) == dict(halves_curve[-3:])
    assert len(dict(halves_curve)) == len(halves_curve)


def test_resume_falls_back_on_an_older_checkpoint(in_tmp_path, toy):
    _, folder = run(toy())
    newest, older = folder.checkpoints.newest_first()
    learner = newest / "learner.pt"
    learner.write_bytes(learner.read_bytes()[: learner.stat().st_size // 2])
    checkpoint, state = newest_readable(folder, toy())
    assert checkpoint == older
    assert state["step"] == 0
    for path in older.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        newest_readable(folder, toy())


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("replay_share", [0.0, 0.5])
def test_a_toy_is_learned_exactly(in_tmp_path, toy, noise, replay_share):
    """2 letters, length 3: excess KL < 1e-3, on-policy and half replayed alike."""
    changes = {
        "run.num_learner_steps": 1500, "environment.noise": noise, "replay.replay_share": replay_share,
        "replay.capacity": 5000, "network.hidden_size": 32, "learner.learning_rate": 5e-3, "learner.batch_size": 128,
        "actors.batch_size": 256, "dynamics.batch_size": 128, "dynamics.learning_rate": 5e-3, "evaluation.every_steps": 1500,
    }  # fmt: skip
    code, folder = run(toy(**changes))
    result = summary(folder)
    assert code == 0
    assert result["excess_kl"] < 1e-3
    assert abs(result["log_z_error"]) < 0.05
    assert result["dynamics_tv"] < 0.03


@pytest.mark.parametrize(("variable_length", "backward", "bar"), [(True, "posterior", 3e-3), (False, "learned", 1e-3)])
def test_variable_lengths_and_the_other_backward_mode_learn(in_tmp_path, toy, variable_length, backward, bar):
    changes = {
        "environment.variable_length": variable_length, "environment.min_length": 1, "objective.backward": backward,
        "run.num_learner_steps": 1200, "learner.batch_size": 128, "actors.batch_size": 256, "learner.learning_rate": 5e-3,
        "dynamics.batch_size": 128, "dynamics.learning_rate": 5e-3, "evaluation.every_steps": 1200,
    }  # fmt: skip
    _, folder = run(toy(**changes))
    assert summary(folder)["excess_kl"] < bar


def test_offline_data_are_pushed_through_the_noise_and_used(in_tmp_path, toy):
    (in_tmp_path / "known.csv").write_text("sequence\nAAA\nAAB\n")
    changes = {"replay.offline_source": "file", "replay.offline_path": "known.csv", "replay.offline_share": 0.25}
    _, folder = run(toy(**changes))
    with np.load(folder.checkpoints.newest_first()[0] / "replay_buffer.npz") as saved:
        assert (saved["offline_policy_version"] == -1).all()
        assert saved["offline_actions"].tolist() in ([[0, 0, 0], [0, 0, 1]], [[0, 0, 1], [0, 0, 0]])


def test_rejected_scores_are_counted_and_training_goes_on(in_tmp_path, toy):
    _, folder = run(toy(**{"oracle.function": "tests.oracles:nan_for_aaa"}))
    result = summary(folder)
    assert result["status"] == "done"
    assert result["num_rejected"] > 0
    assert result["num_sampled"] == result["num_stored"] + result["num_dropped"]


@pytest.mark.parametrize(
    ("function", "retries", "message"),
    [
        ("always_nan", 0, "no valid score"),
        ("always_raises", 0, "the assay is on fire"),
        ("always_raises", 9, "20 times"),
    ],
)
def test_a_useless_oracle_ends_the_run_with_its_cause(in_tmp_path, toy, caplog, function, retries, message):
    changes = {
        "oracle.function": f"tests.oracles:{function}",
        "evaluation.exact": "never",
        "oracle.max_retries": retries,
    }
    code, folder = run(toy(**changes))
    assert code == 1
    assert summary(folder)["status"] == "failed"
    assert message in caplog.text


def test_an_oracle_that_fails_only_at_the_end_leaves_a_saved_sampler(in_tmp_path, toy, monkeypatch):
    from actors.oracles.base import OracleError
    from distributed.evaluation import Evaluator

    def fail(*_: object) -> None:
        raise OracleError("gone home")

    monkeypatch.setattr(Evaluator, "sample_metrics", fail)
    code, folder = run(toy(**{"evaluation.every_steps": 1000}))
    assert code == 1
    assert summary(folder)["error"] == "gone home"
    assert load_sampler(folder.path)[1].step == 24


def test_a_hanging_oracle_is_stopped_and_the_run_goes_on(in_tmp_path, toy, monkeypatch):
    monkeypatch.setenv("HANG_MARKER", str(in_tmp_path / "hung"))
    changes = {
        "oracle.function": "tests.oracles:hangs_once",
        "oracle.timeout_seconds": 0.5,
        "evaluation.exact": "never",
    }
    code, _ = run(toy(**changes))
    assert code == 0
    assert (in_tmp_path / "hung").exists()


def test_a_full_disk_costs_a_checkpoint_not_the_run(in_tmp_path, toy, monkeypatch, caplog):
    from actors.replay_buffer import ReplayBuffer

    def full(self: ReplayBuffer, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ReplayBuffer, "save", full)
    code, folder = run(toy())
    assert code == 0
    assert "No space left" in caplog.text
    assert folder.checkpoints.newest_first() == []
    assert not list((folder.path / "checkpoints").glob(".step*"))


def test_max_seconds_ends_cleanly(in_tmp_path, toy):
    code, folder = run(toy(**{"run.num_learner_steps": 1_000_000, "run.max_seconds": 1.5}))
    result = summary(folder)
    assert (code, result["status"]) == (0, "done")
    assert 0 < result["num_learner_steps"] < 1_000_000


def test_an_existing_run_folder_is_not_touched(in_tmp_path, toy):
    run(toy())
    with pytest.raises(ConfigError, match="--resume"):
        run(toy())


def test_resume_of_a_folder_that_is_none(in_tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        main(["--resume", str(in_tmp_path)])
