"""`evaluate` and `sample` on a trained toy."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from distributed import evaluate, sample
from distributed.checkpoints import load_sampler
from distributed.cli import exit_with
from distributed.config import ConfigError, validate
from distributed.run import main as run_main
from distributed.run import train
from distributed.run_folder import RunFolder
from distributed.sampling import draw
from learner.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import TOY


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(validate(TOY), None, None, None) == 0
    return folder / "runs" / "toy"


@pytest.fixture
def trained(trained_once, in_tmp_path) -> RunFolder:
    """A copy of a trained run, as if it had been trained here."""
    return RunFolder(shutil.copytree(trained_once, in_tmp_path / "runs" / "toy"))


def sampled(capsys, *arguments: str) -> list[dict[str, str]]:
    capsys.readouterr()
    assert sample.main([*arguments, "--format", "csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_evaluate_repeats_the_summary_from_folder_checkpoint_and_file(trained, capsys):
    summary = json.loads(trained.summary_file.read_text())
    checkpoint = trained.checkpoints.newest_first()[0]
    for path in (trained.path, checkpoint, checkpoint / "learner.pt"):
        capsys.readouterr()
        assert evaluate.main([str(path), "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        for key in ("exact_tv", "excess_kl", "mean_score", "num_modes", "num_learner_steps"):
            assert figures[key] == pytest.approx(summary[key])


def test_evaluate_prints_a_table_and_takes_overrides(trained, capsys):
    assert evaluate.main([str(trained.path), "--evaluation.exact", "never", "--evaluation.num_samples", "10"]) == 0
    shown = capsys.readouterr().out
    assert "mean_score" in shown
    assert "exact_tv" not in shown


def test_the_table_shows_units(trained, capsys):
    evaluate.main([str(trained.path)])
    assert "exact KL(target ‖ sampler) [nats]" in capsys.readouterr().out


def test_samples_are_reproducible_scored_and_follow_the_exact_law(trained, capsys):
    first = sampled(capsys, str(trained.path), "-n", "6000", "--seed", "3")
    assert first == sampled(capsys, str(trained.path), "-n", "6000", "--seed", "3")
    assert first != sampled(capsys, str(trained.path), "-n", "6000", "--seed", "4")
    assert all(float(row["score"]) == pytest.approx((1 + row["sequence"].count("B")) / 5) for row in first[:100])
    evaluator, weights = evaluate.open_sampler(trained.path, [])
    _, law = evaluator.exact_metrics(weights)
    evaluator.oracle.close()
    codes = [int(row["sequence"].translate(str.maketrans("AB", "01")), 2) for row in first]
    seen, expected = np.bincount(codes, minlength=8), 6000 * law.law
    # chi-square with 7 degrees of freedom; above 29.9 with probability 1e-4
    assert ((seen - expected) ** 2 / expected).sum() < 29.9


def test_without_noise_the_intentions_are_realised(trained, capsys):
    evaluator, weights = evaluate.open_sampler(trained.path, [])
    noisy, plain = (draw(evaluator, weights, 5000, seed=0, noise=noise) for noise in (True, False))
    evaluator.oracle.close()
    assert np.array_equal(plain.tokens, plain.actions)
    # α/2 = .1 of the letters differ; the standard error is .0024, so ± .0125 errs once in 10^6
    assert np.mean(noisy.tokens != noisy.actions) == pytest.approx(0.1, abs=0.0125)
    rows = sampled(capsys, str(trained.path), "-n", "5000", "--no-noise")
    sequences = evaluator.environment.sequences(plain.tokens, plain.num_steps)
    assert [row["sequence"] for row in rows] == [s.decode() for s in sequences]


def test_fasta_to_a_file(trained, in_tmp_path):
    assert sample.main([str(trained.path), "-n", "3", "--out", "x.fasta"]) == 0
    lines = (in_tmp_path / "x.fasta").read_text().splitlines()
    assert [line[:9] for line in lines[::2]] == [">sample_1", ">sample_2", ">sample_3"]
    assert all(set(line) <= set("AB") and len(line) == 3 for line in lines[1::2])


@pytest.mark.parametrize("command", [evaluate, sample])
def test_paths_that_hold_no_sampler(in_tmp_path, command):
    (in_tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 not really")
    for path, message in (("nowhere", "neither a run folder"), (".", "neither a run folder"), ("broken.pt", "damaged")):
        with pytest.raises(ConfigError, match=message):
            command.main([path])


def test_a_checkpoint_of_another_network_or_format(trained, in_tmp_path):
    file = trained.checkpoints.newest_first()[0] / "learner.pt"
    saved = load_checkpoint(file)
    config = yaml.safe_load(saved["config"])
    config["network"]["hidden_size"] = 17
    save_checkpoint(in_tmp_path / "other.pt", saved | {"config": yaml.safe_dump(config)})
    with pytest.raises(ConfigError, match="do not fit"):
        evaluate.main(["other.pt"])
    save_checkpoint(in_tmp_path / "old.pt", saved | {"format_version": 0})
    with pytest.raises(ConfigError, match="format version 0"):
        evaluate.main(["old.pt"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "n: got 0"),
        (["--seed", "-1"], "seed: got -1"),
        (["--out", "no/such/folder/x"], "cannot be written"),
    ],
)
def test_what_sample_refuses(trained, arguments, message):
    with pytest.raises(ConfigError, match=message):
        sample.main([str(trained.path), *arguments])


def test_a_run_is_resumed_only_on_its_backend_and_length(trained):
    with pytest.raises(ConfigError, match=r"run\.backend"):
        run_main(["--resume", str(trained.path), "--run.backend", "ray"])
    with pytest.raises(ConfigError, match="give no config file"):
        run_main(["x.yaml", "--resume", str(trained.path)])


def test_a_resume_whose_network_does_not_fit_is_a_clear_error(trained):
    with pytest.raises(ConfigError, match="does not fit"):
        run_main(["--resume", str(trained.path), "--network.hidden_size", "17", "--run.num_learner_steps", "48"])


def test_a_resume_records_its_overrides(trained):
    assert run_main(["--resume", str(trained.path), "--run.num_learner_steps", "32"]) == 0
    assert trained.load_config([]).run.num_learner_steps == 32
    assert load_sampler(trained.path)[0].run.num_learner_steps == 32


def test_a_resume_sets_damaged_checkpoints_aside(trained):
    newest = trained.checkpoints.newest_first()[0]
    (newest / "learner.pt").write_bytes(b"")
    assert run_main(["--resume", str(trained.path)]) == 0
    assert (newest.parent / f"damaged_{newest.name}").is_dir()
    assert load_sampler(trained.path)[1].step == 24


def test_one_process_at_a_time_works_in_a_run_folder(trained):
    with trained.locked(), pytest.raises(ConfigError, match="another process"):
        run_main(["--resume", str(trained.path)])


def test_a_run_that_ends_before_its_first_step_is_judged_all_the_same(in_tmp_path, toy):
    assert train(toy(**{"run.max_seconds": 1e-6}), None, None, None) == 0
    summary = json.loads((in_tmp_path / "runs/toy/summary.json").read_text())
    assert (summary["num_learner_steps"], summary["status"]) == (0, "done")
    assert summary["excess_kl"] > 0.01


def test_rejected_scores_are_no_part_of_the_exact_figures(in_tmp_path, toy):
    assert train(toy(**{"oracle.function": "tests.oracles:negative_for_aaa"}), None, None, None) == 0
    text = (in_tmp_path / "runs/toy/summary.json").read_text()
    summary = json.loads(text, parse_constant=pytest.fail)  # no NaN or Infinity, which is no JSON
    assert summary["target_mean_score"] == pytest.approx(0.5)
    assert 0 < summary["exact_mean_score"] < 0.5


@pytest.mark.parametrize("function", ["always_nan", "always_raises"])
def test_an_oracle_that_fails_in_a_command_is_a_message_and_exit_code_1(trained, monkeypatch, capsys, function):
    arguments = [str(trained.path), "--oracle.function", f"tests.oracles:{function}", "--evaluation.exact", "never"]
    arguments += ["--oracle.max_retries", "9", "--oracle.max_consecutive_failures", "3"]
    with pytest.raises(SystemExit) as caught:
        exit_with(lambda _: evaluate.main(arguments))
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on(in_tmp_path, toy):
    """Files may grow to 60 kB only: far less than a checkpoint needs."""
    config = toy(**{"network.hidden_size": 128}).to_yaml()
    (in_tmp_path / "toy.yaml").write_text(config)
    program = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); import signal; "
    program += (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from distributed.run import main; sys.exit(main(['toy.yaml']))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=in_tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no checkpoint at step" in done.stderr
    assert not list((in_tmp_path / "runs/toy/checkpoints").glob("*"))
