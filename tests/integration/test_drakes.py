"""The generator drakes through the commands: both backends, resume, dead actors, templates, data that do not fit."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import ray

from distributed import api, evaluate, run, sample
from distributed.checkpoints import CheckpointStore
from distributed.config import ConfigError, validate
from distributed.ray_backend import RayBackend
from distributed.run_folder import RunFolder
from distributed.training_loop import INTERRUPTED, Hooks
from tests.conftest import TOY
from tests.glossary import unexplained

CONFIG = {
    "run": {"backend": "serial", "num_learner_steps": 100, "name": "d"},
    "generator": {
        "name": "drakes",
        "denoiser": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
        "pretraining": {"num_steps": 60, "batch_size": 32},
        "rollout": {"num_steps": 4},
        "reward_model": {"warm_start_steps": 20, "batch_size": 32},
        "batch_size": 16,
    },
    "environment": {"alphabet": "ACGT", "length": 4, "noise": 0},
    "oracle": {"name": "callable", "function": "tests.oracles:share_of_c"},
    "actors": {"batch_size": 16},
    "replay": {"offline_source": "file", "offline_path": "data.csv"},
    "evaluation": {"exact": "always", "num_samples": 64, "every_steps": 50},
    "tracking": {"mlflow": False, "log_every_steps": 5},
}


def config(**changes):
    values = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return validate(values)


def write_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    sequences = ["".join("ACGT"[i] for i in row) for row in rng.choice(4, (300, 4), p=[0.4, 0.1, 0.1, 0.4])]
    (folder / "data.csv").write_text("\n".join(["sequence", *sequences]) + "\n")


@pytest.fixture
def data(in_tmp_path):
    write_data(in_tmp_path)
    return in_tmp_path


ESTIMATORS = {
    "straight_through": {},
    "relaxed": {"generator.rollout.truncation": 2},
    "reinforce": {"generator.standardise": False},
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_whole_run(data, estimator):
    settings = config(**{"generator.rollout.estimator": estimator}, **ESTIMATORS[estimator])
    assert run.train(settings, None, None, None) == 0
    folder = RunFolder(data / "runs" / "d")
    summary = json.loads(folder.summary_file.read_text())
    assert summary["num_learner_steps"] == 100
    assert summary["path_kl"] > 0
    assert summary["exact_nelbo"] >= summary["exact_nll"] - 1e-6
    assert summary["objective_j"] <= summary["objective_j_star"] + 1e-6
    assert summary["exact_mean_score"] <= summary["frontier_score"] + 1e-6
    assert summary["num_sampled"] == summary["num_stored"] + summary["num_dropped"]
    records = list(folder.read_metrics())
    assert {"nelbo", "path_kl", "alpha"} <= {name for record in records for name in record}
    evaluations = [record for record in records if "exact_nll" in record]
    assert evaluations[0]["path_kl"] == pytest.approx(0, abs=1e-6)  # while it is pretrained
    assert (folder.plots / "frontier.png").exists()


def test_all_terms_at_once(data):
    settings = config(
        **{
            "generator.adversarial_weight": 0.1, "generator.adversarial_start": 0, "generator.diversity_weight": 0.1,
            "generator.constraints": [{"name": "gc_content", "target": 0.5}, {"name": "homopolymer", "max_run": 2}],
            "generator.bank_weight": 0.1, "generator.num_designs": 8, "generator.local_search_share": 0.5,
            "generator.alpha": {"mode": "kl", "kl_target": 0.5}, "generator.scheduler": "onecycle",
            "generator.average_decay": 0.9,
        }
    )  # fmt: skip
    assert run.train(settings, None, None, None) == 0
    summary = json.loads((data / "runs/d/summary.json").read_text())
    assert summary["num_sampled"] > 40 * 16  # the learner's own sequences were scored too
    names = {name for record in RunFolder(data / "runs/d").read_metrics() for name in record}
    assert {"discriminator_loss", "bank_nelbo", "gc_content_penalty", "bank_size", "any_violated"} <= names


@pytest.mark.parametrize("stop", [30, 80])
def test_a_resumed_run_is_the_same_run(data, stop):
    """Stopped while it is pretrained, and while it is fine-tuned."""
    assert run.train(config(**{"run.name": "whole"}), None, None, None) == 0
    settings, asked = config(**{"run.name": "part"}), Counter()

    def reason() -> str | None:
        asked["steps"] += 20 if asked["steps"] < 60 else 1  # those of a call
        return INTERRUPTED if asked["steps"] > stop else None

    folder, summary = run.train_in_folder(settings, None, None, None, Hooks(stop_reason=reason))
    assert summary["status"] == INTERRUPTED
    assert 0 < summary["num_learner_steps"] < 100
    assert run.train(settings, folder, *run.newest_readable(folder, settings)) == 0
    ours, theirs = (json.loads((data / f"runs/{name}/summary.json").read_text()) for name in ("part", "whole"))
    for name in ("exact_nll", "path_kl", "objective_j", "mean_score", "num_sampled"):
        assert ours[name] == theirs[name], name


def test_on_ray_with_dead_actors(data, ray_session):
    settings = config(**{"run.backend": "ray", "actors.num_rollout_actors": 2, "generator.num_designs": 4})
    backend = RayBackend(settings, CheckpointStore(data / "checkpoints"))
    try:
        backend.start(None)
        step = 0
        while step < 70:
            result = backend.step()
            step = result.step if result else step
        assert backend.accounting.num_sampled > 0
        backend.store.write(step, backend.save)
        for slot in (backend._learner, backend._pool.slots[0], backend._buffer):
            answer = ray.get(slot.handle.ready.remote())
            os.kill(answer[0] if isinstance(answer, tuple) else answer, signal.SIGKILL)
            while not slot.restarts:
                backend.step()
            assert backend.accounting.balanced
        while step < 90:
            result = backend.step()
            step = result.step if result else step
        backend.drain()
        assert backend.accounting.balanced
        assert backend.accounting.num_in_flight == 0
    finally:
        backend.close()


def test_the_command_on_ray(data, ray_session):
    settings = config(**{"run.backend": "ray"})
    assert run.train(settings, None, None, None) == 0
    summary = json.loads((data / "runs/d/summary.json").read_text())
    assert summary["num_learner_steps"] >= 100
    assert summary["num_sampled"] == summary["num_stored"] + summary["num_dropped"] + summary["num_in_flight"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run.train(config(), None, None, None) == 0
        yield folder / "runs/d"


def test_sample_and_evaluate(trained, capsys):
    capsys.readouterr()
    assert evaluate.main([str(trained), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    summary = json.loads((trained / "summary.json").read_text())
    for name in ("objective_j", "reward_gap"):
        assert figures[name] == pytest.approx(summary[name])
    assert sample.main([str(trained), "-n", "20", "--template", "acNN", "--format", "csv", "--top-k", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 20
    assert all(line.startswith("AC") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--template", "ACGTN"], "position 5 is beyond the length 4"),
        (["--template", "AXNN"], "'X' at position 2"),
        (["--template", "AC"], "ends after position 2"),
        (["--top-k", "0"], "top_k"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_sampling_that_cannot_be(trained, arguments, message):
    with pytest.raises(ConfigError, match=message):
        sample.main([str(trained), *arguments])


def test_templates_are_for_drakes_only(in_tmp_path):
    assert run.train(validate(TOY), None, None, None) == 0
    with pytest.raises(ConfigError, match="drakes only"):
        sample.main(["runs/toy", "--template", "ABN"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment.noise": 0.1}, "without noise"),
        ({"environment.alphabet": "ACGU"}, "draws DNA"),
        ({"replay": {}}, "offline_source must not be none"),
        ({"run.num_learner_steps": 10}, "fewer than the first"),
        ({"generator.rollout.estimator": "reinforce", "generator.diversity_weight": 1}, "needs gradients"),
        ({"generator.rollout.truncation": 9}, "must not exceed num_steps"),
        ({"generator.colour": 1}, "generator.colour: unknown key"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_alpha_by_reward_needs_scores_at_hand(data):
    with pytest.raises(ConfigError, match="allowed: kl, fixed"):
        run.train(config(**{"generator.alpha.mode": "reward"}), None, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sequence\n", "empty|no sequence"),
        ("sequence\nACGTA\n", "length"),
        ("sequence\nACGX\n", "X"),
        ("seq\nACGT\n", "column"),
    ],
)
def test_data_that_cannot_be(data, text, message):
    (data / "data.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        run.train(config(), None, None, None)


def test_scores_that_are_no_numbers_are_left_out(data):
    settings = config(**{"oracle.function": "tests.oracles:nan_for_aaaa", "evaluation.exact": "never"})
    assert run.train(settings, None, None, None) == 0
    summary = json.loads((data / "runs/d/summary.json").read_text())
    assert summary["num_rejected"] > 0
    assert np.isfinite(summary["mean_score"])


def test_the_shipped_motifs_config_runs(in_tmp_path, monkeypatch):
    monkeypatch.setattr("distributed.design_evaluation.MAX_REFERENCE", 100)
    words = (
        "--run.num_learner_steps 12 --generator.pretraining.num_steps 10 --run.backend serial --tracking.mlflow false "
        "--replay.offline_size 200 --actors.batch_size 8 --generator.batch_size 8 --evaluation.num_samples 32 "
        "--tracking.log_every_steps 1"
    )
    file = Path(__file__).parents[2] / "tune_configs" / "drakes_motifs.yaml"
    assert run.main([str(file), *words.split(), "--run.name", "m"]) == 0
    summary = json.loads(Path("runs/m/summary.json").read_text())
    assert 0 <= summary["mean_score"] <= 1
    assert summary["gc_rmse"] < 0.2
    assert abs(summary["kmer_correlation"]) <= 1
    assert 60 < summary["data_entropy"] < 70
    assert summary["data_entropy"] < summary["pretrained_nelbo"] < 80
    assert summary["true_log_prob"] < -summary["data_entropy"]  # of a model that has hardly been trained
    assert summary["true_log_prob_z"] < 0
    assert abs(summary["path_kl"]) < 1  # two steps from where it began
    records = RunFolder(Path("runs/m")).read_metrics()
    assert {"nelbo", "path_kl", "gc_content_penalty"} <= {name for record in records for name in record}


def test_a_known_law_needs_room_for_its_motifs_and_their_letters(data):
    with pytest.raises(ConfigError, match=r"replay\.motif_law\.motifs: .* wide; allowed: up to environment\.length 4"):
        run.train(config(**{"replay": {"offline_source": "motif_law"}}), None, None, None)
    settings = validate(TOY | {"replay": {"offline_source": "motif_law"}})
    with pytest.raises(ConfigError, match=r"environment\.alphabet must be ACGT, got"):
        run.train(settings, None, None, None)


def test_the_shipped_config_runs(in_tmp_path, capsys):
    """Briefly, and with a small network, which is better than uniform sequences all the same."""
    words = (
        "--run.num_learner_steps 45 --run.backend serial --tracking.mlflow false --generator.pretraining.num_steps 40 "
    )
    words += "--generator.denoiser.hidden_size 16 --generator.denoiser.num_layers 1 --generator.denoiser.num_heads 2"
    file = Path(__file__).parents[2] / "tune_configs" / "drakes_tfbind8.yaml"
    assert run.main([str(file), *words.split(), "--run.name", "t"]) == 0
    assert "objective_j_star" in capsys.readouterr().out
    summary = json.loads(Path("runs/t/summary.json").read_text())
    assert summary["exact_nll"] < 8 * np.log(4)
    assert summary["objective_j_star"] > summary["pretrained_mean_score"]


def test_an_export_and_the_report_hold_all_there_is(trained, tmp_path):
    run = api.load(trained)
    again = api.load(run.export(tmp_path / "exported"))
    assert again.sample(20, seed=1).sequences == run.sample(20, seed=1).sequences
    assert again.evaluate() == pytest.approx(run.evaluate(), nan_ok=True)
    chosen = run.sample(5, select="diverse", template="ACNN", num_drawn=200)
    assert len({s for s in chosen.sequences if s.startswith("AC")}) == 5
    assert (Path(trained) / "report.html").read_text().count("data:image/png") >= 4
    assert unexplained(Path(trained)) == set()
    with pytest.raises(ConfigError, match=r"run\.start_from goes with generator\.name gflownet or forecast"):
        api.train(run.config, run={"name": "warm", "start_from": str(trained)})
    with pytest.raises(ConfigError, match="draws no forecasts, but sequences"):
        run.forecast(3)
