"""Training, sampling and exporting from Python."""

import json
import logging
import re
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml

from distributed.api import ConfigError, Run, RunFailed, load, train
from distributed.run_folder import RunFolder
from learner.metrics import NoSampleError
from tests.conftest import TOY

DNA = TOY | {
    "environment": {"alphabet": "ACGT", "length": 4, "noise": 0.1},
    "oracle": {"name": "callable", "function": "tests.oracles:share_of_c"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("api"))
        return load((train(DNA, run={"output_folder": str(Path.cwd())})).folder)


def test_train_takes_a_dict_a_file_or_a_config_and_leaves_the_folder_of_the_command(in_tmp_path, toy):
    (in_tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    runs = [
        train(TOY, run={"name": "a"}),
        train("toy.yaml", **{"run.name": "b"}),
        train(toy(**{"run.name": "c"})),
    ]
    assert [run.folder for run in runs] == [Path("runs") / name for name in "abc"]
    for run in runs:
        assert run.summary["status"] == "done"
        assert run.summary == json.loads((run.folder / "summary.json").read_text())
        assert run.summary["exact_tv"] == runs[0].summary["exact_tv"]  # the serial backend repeats itself
        assert run.config.run.num_learner_steps == 24
    assert repr(runs[0]) == "Run('runs/a', 24 learner steps)"


def test_a_run_without_a_name_gets_one(in_tmp_path):
    run = train(TOY, **{"run.name": None, "run.max_seconds": 1e-6})
    assert run.folder.name.startswith("run-20")


def test_a_run_goes_on(in_tmp_path):
    train(TOY)
    assert train(resume="runs/toy", run={"num_learner_steps": 32}).summary["num_learner_steps"] == 32
    with pytest.raises(ConfigError, match="no config beside it"):
        train(TOY, resume="runs/toy")


def test_samples_are_those_of_the_command(run, capsys):
    from distributed import sample

    samples = run.sample(7, seed=3)
    sample.main([str(run.folder), "-n", "7", "--seed", "3", "--format", "csv"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == samples.sequences
    assert samples.scores == pytest.approx([s.count("C") / 4 for s in samples.sequences])
    assert (samples.log_policy < 0).all()


def test_evaluate_repeats_the_summary_and_takes_changes(run):
    figures = run.evaluate()
    assert figures["excess_kl"] == pytest.approx(run.summary["excess_kl"])
    assert "exact_tv" not in run.evaluate(evaluation={"exact": "never", "num_samples": 10})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train(DNA, seed=1), r"seed: got 1; allowed: a section \(run, "),
        (lambda: train(DNA, run={"seeed": 1}), r"run\.seeed: unknown key"),
        (lambda: train({"run": 3}), "run: got 3"),
        (lambda: train("nowhere.yaml"), "cannot be read"),
        (lambda: load("nowhere"), "neither a run folder"),
    ],
)
def test_what_the_api_refuses(in_tmp_path, call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n": 0}, "n: got 0"), ({"seed": -1}, "seed: got -1"), ({"temperature": 2.0}, "drakes only"),
     ({"colour": 1}, "colour: unknown key; allowed: n, seed"), ({"gc_min": 0.5}, "go with select"),
     ({"select": "top", "gc_min": 0.6, "gc_max": 0.4}, "above gc_max"), ({"select": "best"}, "'top'"),
     ({"select": "top", "forbid": ["GAXTC"]}, "forbid"), ({"select": "top", "n": 50, "num_drawn": 49}, "fewer than the 50")],
)  # fmt: skip
def test_what_sampling_refuses(run, options, message):
    with pytest.raises(ConfigError, match=message):
        run.sample(**options)


def test_a_run_that_fails_is_an_exception_with_its_cause(in_tmp_path):
    with pytest.raises(RunFailed, match="no valid score"):
        train(TOY, oracle={"function": "tests.oracles:always_nan"}, evaluation={"exact": "never"})


def test_a_program_keeps_its_signals_its_logging_and_its_output(in_tmp_path):
    """In a process of its own, as pytest has set up logging: signals untouched, nothing on stdout, logs on stderr."""
    program = f"""
import logging, signal
from distributed.api import train
seen = []
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
import distributed.training_loop as loop
inner = loop.TrainingLoop._record
def record(self, *given):
    seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before)
    return inner(self, *given)
loop.TrainingLoop._record = record
train({TOY!r})
assert seen and all(seen)
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=in_tmp_path, env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "run folder runs/toy" in done.stderr


def test_the_logging_of_a_program_is_left_alone(in_tmp_path):
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    assert handlers  # pytest's
    train(TOY, run={"max_seconds": 1e-6})
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)


def test_an_interrupt_leaves_a_run_that_goes_on(in_tmp_path, monkeypatch):
    from distributed.local_backend import SerialBackend

    def interrupted(self):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SerialBackend, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TOY)
    monkeypatch.undo()
    monkeypatch.chdir(in_tmp_path)
    assert train(resume="runs/toy").summary["num_learner_steps"] == 24


def test_the_best_and_the_farthest_apart_are_chosen_within_limits(run):
    limits = {"num_drawn": 3000, "gc_min": 0.25, "gc_max": 0.75, "forbid": ["AC", "WW"]}
    top, diverse = (run.sample(12, select=how, **limits) for how in ("top", "diverse"))
    drawn = run.sample(3000)
    allowed = {
        sequence: score
        for sequence, score in zip(drawn.sequences, drawn.scores, strict=True)
        if 1 <= sequence.count("G") + sequence.count("C") <= 3 and not re.search("AC|GT|[AT][AT]", sequence)
    }
    for chosen in (top, diverse):
        assert len(set(chosen.sequences)) == 12
        assert set(chosen.sequences) <= allowed.keys()
        assert chosen.scores[0] == max(allowed.values())
    assert sorted(top.scores, reverse=True) == list(top.scores) == sorted(allowed.values(), reverse=True)[:12]
    distances = [
        [sum(a != b for a, b in zip(s, t, strict=True)) for t in chosen.sequences if t != s]
        for chosen in (top, diverse) for s in chosen.sequences
    ]  # fmt: skip
    nearest = [min(row) for row in distances]
    assert min(nearest[12:]) >= min(nearest[:12])
    assert np.mean(distances[12:]) > np.mean(distances[:12])


def test_too_few_candidates_are_told_why(run, caplog):
    few = run.sample(300, select="top", num_drawn=400, min_score=0.5)
    assert 0 < len(few.sequences) < 300
    assert f"{len(few.sequences)} candidates remain of the 300 wanted: 400 drawn" in caplog.text
    assert "scoring 0.5 or more" in caplog.text
    with pytest.raises(NoSampleError, match=r"no candidate remains: .* 0 scoring 2 or more"):
        run.sample(3, select="top", min_score=2)


def test_limits_of_bases_are_for_dna_and_rna(in_tmp_path, toy):
    run = train(toy(**{"run.max_seconds": 1e-6}))
    with pytest.raises(ConfigError, match="the alphabet is AB"):
        run.sample(3, select="top", gc_max=0.5)


def test_an_export_samples_alike_and_can_be_moved(in_tmp_path):
    (in_tmp_path / "measured.csv").write_text("sequence,score\nAAAA,0.5\nCCCC,1\n")
    run = train(DNA | {"oracle": {"name": "csv", "path": "measured.csv", "missing_score": 0.1}})
    folder = run.export("out/sampler")
    assert sorted(p.name for p in folder.iterdir()) == ["data", "sampler.json", "sampler.safetensors"]
    with pytest.raises(ConfigError, match="exists"):
        run.export(folder)
    (in_tmp_path / "measured.csv").unlink()
    moved = folder.rename(in_tmp_path / "moved")
    again = load(moved)
    ours, theirs = again.sample(50, seed=1), run_from(RunFolder(run.folder), moved).sample(50, seed=1)
    assert ours.sequences == theirs.sequences
    assert np.array_equal(ours.scores, theirs.scores)
    assert again.summary == run.summary
    assert again.evaluate()["excess_kl"] == pytest.approx(run.summary["excess_kl"])


def run_from(folder: RunFolder, moved: Path) -> Run:
    """The run, with the data where they are now."""
    run = load(folder.path)
    run.config = load(moved).config
    return run


def test_commands_open_an_export(run, tmp_path, capsys):
    from distributed import evaluate

    assert evaluate.main([str(run.export(tmp_path / "x")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact_tv"] == pytest.approx(run.summary["exact_tv"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sampler.json", "{", "damaged"),
        ("sampler.json", '{"format_version": 9}', "format version 1"),
        ("sampler.json", '{"format_version": 1, "config": {}, "summary": {}}', "num_learner_steps"),
        ("sampler.json", "[" * 100_000, "damaged"),
        ("sampler.safetensors", "", "damaged"),
        ("sampler.safetensors", "\x00" * 64, "damaged"),
    ],
)
def test_damaged_exports_are_refused(run, tmp_path, file, content, message):
    folder = run.export(tmp_path / "x")
    (folder / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(folder).sample(1)


def test_exports_with_other_weights_are_refused(run, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = run.export(tmp_path / "x")
    tensors = load_file(folder / "sampler.safetensors")
    for policy, message in ((tensors["policy"][:-1], "do not fit"), (tensors["policy"] * np.nan, "finite")):
        save_file(tensors | {"policy": np.ascontiguousarray(policy)}, folder / "sampler.safetensors")
        with pytest.raises(ConfigError, match=message):
            load(folder).sample(1)


@pytest.mark.parametrize("package", ["learner", "actors", "distributed"])
def test_packages_say_that_they_are_typed(package):
    assert (files(package) / "py.typed").is_file()
