"""`evaluate` and `sample` on a trained toy."""

import csv
import io
import json

import numpy as np
import pytest
import yaml

from distributed import evaluate, sample
from distributed.config import ConfigError
from distributed.run import main as run_main
from distributed.run import train
from distributed.run_folder import RunFolder
from learner.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def trained(in_tmp_path, toy) -> RunFolder:
    assert train(toy(), None, None, None) == 0
    return RunFolder(in_tmp_path / "runs" / "toy")


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
    noisy, plain = (sample.draw(evaluator, weights, 5000, seed=0, noise=noise) for noise in (True, False))
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
    [(["-n", "0"], "n >= 1"), (["--seed", "-1"], "seed >= 0"), (["--out", "no/such/folder/x"], "cannot be written")],
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
