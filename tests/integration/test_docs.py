"""The README's commands are run as they stand, with fewer steps, and most runs on the serial backend."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from actors.oracles.tfbind8 import e_score_table
from distributed.config import ExperimentConfig
from distributed.config_keys import describe_fields, validate_section
from distributed.search_space import check_space
from distributed.sweep_config import SweepConfig
from tests.benchmarks.__main__ import BENCHMARKS
from tests.glossary import NAMES, keys, unexplained

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = (ROOT / "README.md").read_text(), (ROOT / "CONTRIBUTING.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip().startswith("python -m")
]
TOLD_IN_ORDER = ("own_oracle.md",)
"""Guides whose commands build on each other, and on files that they show."""
GUIDE_COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for guide in (ROOT / "docs").glob("*.md")
        if guide.name not in TOLD_IN_ORDER
        for line in guide.read_text().splitlines()
        if line.strip().startswith("python -m") and "tests.benchmarks" not in line
    }
    - set(COMMANDS)
)
"""Those of docs/ that the README has not; benchmarks take minutes to hours, and have a test below."""
SHORT = shlex.split(
    "--run.num_learner_steps 24 --evaluation.num_samples 64 --network.hidden_size 16 --network.num_layers 2"
)
ON_RAY = {
    "python -m distributed.run",
    "python -m distributed.run --run.name first",
    "python -m distributed.run tune_configs/motifs.yaml --run.name motifs",
}
"""Runs that start a Ray of their own; the others show what their keys do on the backend that starts sooner."""
PATIENCE_SECONDS = 180


def execute(command: str, folder: Path) -> subprocess.CompletedProcess:
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    if words[2] == "distributed.run" and not {"--resume", "--help"} & set(words):
        words += [*SHORT, "--tracking.mlflow", "false"]
        if command not in ON_RAY and "--run.backend" not in words:
            words += ["--run.backend", "serial"]
    if "tune_configs/drakes" in command:
        words += shlex.split("--generator.pretraining.num_steps 12 --evaluation.exact never --run.backend serial")
        words += shlex.split("--replay.offline_size 500 --generator.batch_size 16 --actors.batch_size 16")
    if words[2] == "distributed.sweep" and not {"--resume", "--help"} & set(words):
        words += [*SHORT, *shlex.split("--run.backend serial --sweep.seeds [0]")]
        if "tune_configs/sweep_gamma.yaml" in words:  # four of its points
            words += ["--sweep.space", "{objective.gamma: {grid: [0.1, 0.9]}, reward.exponent: {grid: [1, 5]}}"]
    if words[2] == "distributed.compare_objectives" and "--help" not in words:
        words += shlex.split("--comparison.cpu_seconds 0.3 --comparison.seeds [0] --comparison.noise [0.25]")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_of_the_readme_run_in_order(tmp_path):
    (tmp_path / "tune_configs").symlink_to(ROOT / "tune_configs")
    letters = np.array(list("ACGT"))
    rows = {"".join(letters[row]) for row in np.random.default_rng(0).integers(0, 4, (300, 8))}
    (tmp_path / "measured.csv").write_text(
        "sequence,score\n" + "".join(f"{s},{s.count('G') / 8}\n" for s in sorted(rows))
    )
    assert len(COMMANDS) >= 12
    assert set(COMMANDS) >= ON_RAY
    for command in COMMANDS:
        command = command.replace("--run.num_learner_steps 6000", "--run.num_learner_steps 32")
        done = execute(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        if "--json" in command:
            assert 0 < json.loads(done.stdout)["exact_tv"] < 1
        if "compare_objectives" in command:
            assert (tmp_path / "runs" / "compare_objectives" / "table.png").exists()
        if command.startswith("python -m distributed.sweep"):
            assert "sweep folder: " in done.stdout
            assert (tmp_path / "runs/gamma/sweep.png").exists()
        if command.startswith("python -m distributed.compare --"):
            assert (tmp_path / "runs/comparison/compare.png").exists()
        if command.startswith("python -m distributed.run") and "--print-config" not in command:
            assert "run folder: runs/" in done.stdout
    assert unexplained(tmp_path / "runs" / "first") == set()  # on Ray
    fasta = (tmp_path / "candidates.fasta").read_text().splitlines()
    assert len(fasta) == 1000
    assert re.fullmatch(r">sample_1 score=[\d.]+ log_policy=-[\d.]+", fasta[0])
    assert re.fullmatch("[ACGT]{8}", fasta[1])
    table = (tmp_path / "candidates.csv").read_text().splitlines()
    assert table[0] == "sequence,score,log_policy"
    assert len(table) == 501


ONE_ROW = " --comparison.baselines [] --comparison.variants '{one: {objective: {name: subtb}}}'"
"""The README's command runs all rows of a table like those of the guides."""


@pytest.mark.slow
@pytest.mark.parametrize("command", GUIDE_COMMANDS)
def test_the_commands_of_the_guides_run(command, tmp_path):
    (tmp_path / "tune_configs").symlink_to(ROOT / "tune_configs")
    done = execute(command + ONE_ROW * ("compare_objectives" in command), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def write_files(guide: str, folder: Path) -> None:
    """The files that a guide shows: blocks whose first line is their name."""
    for name, content in re.findall(r"```\w+\n# (\S+\.(?:py|yaml))\n(.*?)```", guide, re.DOTALL):
        (folder / name).write_text(content)


def test_the_guide_for_measured_sequences_ends_with_candidates(tmp_path):
    """A twentieth of the SIX6 table is measured; the guide's model and candidates are judged by the whole of it."""
    guide = (ROOT / "docs" / "own_oracle.md").read_text()
    write_files(guide, tmp_path)
    letters, scores = np.array(list("ACGT")), e_score_table("SIX6_REF_R1")
    sequences = ["".join(letters[[index >> 2 * place & 3 for place in range(7, -1, -1)]]) for index in range(4**8)]
    known = dict(zip(sequences, ((scores - scores.min()) / (scores.max() - scores.min())).tolist(), strict=True))
    measured = np.random.default_rng(0).choice(sequences, 3000, replace=False)
    (tmp_path / "measured.csv").write_text("sequence,score\n" + "".join(f"{s},{known[s]}\n" for s in measured))
    told = subprocess.run(
        [sys.executable, "my_oracle.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert float(told.rpartition(" ")[2]) > 0.5
    train_command, sample_command = re.findall(r"^python -m .*$", guide, re.MULTILINE)
    done = execute(f"{train_command} --run.backend serial --reward.exponent 1", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs/mine/report.html").exists()
    few = sample_command.replace("-n 500", "-n 100").replace("20000", "4000").replace("0.6 --gc", "0.3 --gc")
    done = execute(few, tmp_path)  # the network has seen next to nothing
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "candidates.fasta").read_text().splitlines()
    candidates = lines[1::2]
    assert len(set(candidates)) == len(candidates) == 100
    assert all(3 <= s.count("G") + s.count("C") <= 5 for s in candidates)
    assert not [s for s in candidates if re.search("GAATTC|GGATCC", s)]
    assert np.mean([known[s] for s in candidates]) > np.mean(list(known.values()))


def test_the_changes_of_the_guide_to_extending_apply_and_train(tmp_path):
    """As `git apply` takes them, on a copy of the program."""
    guide = (ROOT / "docs" / "extend.md").read_text()
    changes = re.findall(r"```diff\n(.*?)```", guide, re.DOTALL)
    added = [line for change in changes for line in change.splitlines() if line.startswith("+") and line[1:].strip()]
    assert len(added) - len(changes) <= 40
    for package in ("learner", "actors", "distributed"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for change in changes:
        subprocess.run(["git", "apply", "--recount", "-"], input=change, text=True, cwd=tmp_path, check=True)
    program = """
from distributed.api import train
base = {
    "run": {"backend": "serial", "num_learner_steps": 400}, "environment": {"length": 3, "noise": 0.2},
    "oracle": {"name": "callable", "function": "tests.oracles:share_of_c"}, "network": {"hidden_size": 32, "num_layers": 2},
    "learner": {"batch_size": 64, "learning_rate": 5e-3}, "actors": {"batch_size": 128},
    "dynamics": {"batch_size": 64, "learning_rate": 5e-3}, "tracking": {"mlflow": False},
    "evaluation": {"exact": "always", "num_samples": 64, "every_steps": 400}, "reward": {"exponent": 2},
}
process = train(base, run={"name": "process"}, environment={"transition_ratio": 4})
objective = train(base, run={"name": "objective"}, objective={"name": "log_variance"})
start = train(base, run={"name": "start", "max_seconds": 1e-6})
print(*(run.summary[name] for run in (process, objective, start) for name in ("exact_tv", "dynamics_tv")))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    process_tv, process_dynamics, objective_tv, objective_dynamics, start_tv, start_dynamics = map(
        float, done.stdout.split()
    )
    assert max(process_tv, objective_tv) < 0.6 * start_tv
    assert max(process_dynamics, objective_dynamics) < 0.2 * start_dynamics


def test_the_python_of_the_guide_runs(in_tmp_path, monkeypatch):
    """As it stands, but for the number of steps and of samples."""
    from distributed import api

    (in_tmp_path / "tune_configs").symlink_to(ROOT / "tune_configs")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    whole = api.train
    short = {"run.num_learner_steps": 8, "run.backend": "serial", "tracking.mlflow": False, "network.hidden_size": 16}
    monkeypatch.setattr(api, "train", lambda config, **changes: whole(config, **changes, **short))
    names: dict = {}
    exec(block.replace("10_000", "100").replace("5000", "2000"), names)
    assert len(names["sequences"]) == len(names["scores"]) == 500
    assert len(names["best"].sequences) == 50
    assert (in_tmp_path / "sampler" / "sampler.safetensors").exists()


def test_messages_of_the_troubleshooting_guide_are_those_of_the_program():
    guide = (ROOT / "docs" / "troubleshooting.md").read_text().split("No message, but")[0]
    messages = re.findall(r"^\| `(.+?)` \|", guide, re.MULTILINE)
    assert len(messages) >= 20
    sources = [p.read_text() for layer in ("learner", "actors", "distributed") for p in (ROOT / layer).rglob("*.py")]
    joined = "\n".join(re.sub(r'"\s*\n\s*f?"', "", source) for source in sources)  # of texts over several lines
    parts = [part.strip() for message in messages for part in message.split("…")]
    assert [part for part in parts if part not in joined] == []


@pytest.mark.parametrize(
    "module",
    ["distributed.run", "distributed.evaluate", "distributed.sample", "distributed.attention",
     "distributed.compare_objectives", "distributed.sweep", "distributed.compare", "distributed.doctor",
     "tests.benchmarks.__main__"],
)  # fmt: skip
def test_every_command_has_help(module, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(module).main()
    assert caught.value.code == 0
    assert f"python -m {module.removesuffix('.__main__')} " in capsys.readouterr().out


def test_config_keys_named_in_the_readme_exist():
    known = {key for key, _, _ in describe_fields(ExperimentConfig)}
    sections = {key.split(".")[0] for key in known}
    named = {n for n in re.findall(r"(?<![.\w])([a-z]+\.[a-z_]+)\b(?!\.)", README) if n.split(".")[0] in sections}
    unknown = {n for n in named if n not in known and not n.endswith((".py", ".md", ".yaml", ".npy", ".csv", ".json"))}
    assert not unknown


def test_the_file_and_the_keys_of_the_guide_to_sweeps_are_right():
    guide = (ROOT / "docs" / "sweeps.md").read_text()
    (section,) = (yaml.safe_load(block)["sweep"] for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL))
    sweep = validate_section(SweepConfig, "sweep", section)
    check_space({}, sweep.space)
    known = {key for key, _, _ in describe_fields(ExperimentConfig)} | {
        key for key, _, _ in describe_fields(SweepConfig, "sweep.")
    }
    sections = {key.split(".")[0] for key in known}
    named = {n for n in re.findall(r"`([a-z]+\.[a-z_]+)", guide) if n.split(".")[0] in sections}
    assert {n for n in named if n not in known} <= {"sweep.yaml", "sweep.png"}
    assert len(named & known) >= 6


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective.name": "sgfn_kl", "objective.lookahead_weight": 0.1},
        {"objective.name": "tb", "evaluation.exact": "never", "evaluation.num_samples": 256},
    ],
    ids=["default", "terms", "sampled"],
)
def test_metrics_of_a_run_are_explained(in_tmp_path, toy, changes):
    from distributed.run import train

    config = toy(**changes)
    train(config, None, None, None)
    folder = config.run.output_folder / "toy"
    if "objective.lookahead_weight" in changes:
        terms = {"entropy_high", "entropy_low", "entropy_ratio", "entropy_share", "trajectory_kl", "exploration_loss"}
        assert terms | {"lookahead_ce", "balance_loss"} <= keys(folder)
    assert unexplained(folder) == set()


def test_explained_metrics_are_those_of_the_program():
    sources = [p.read_text() for layer in ("learner", "actors", "distributed") for p in (ROOT / layer).rglob("*.py")]
    words = set(re.findall(r"[a-z0-9_]+", " ".join(sources)))
    built = {"coverage_90", "coverage_50", "binning_error_train", "binning_error_test"}
    built |= {"beyond_bins_train", "beyond_bins_test"}  # from an f-string each
    assert len(NAMES) > 100
    assert {name for name in NAMES - built if "…" not in name and name not in words} == set()


@pytest.mark.parametrize("file", ["README.md", *sorted(f"docs/{guide.name}" for guide in (ROOT / "docs").glob("*.md"))])
def test_links_and_pictures_exist(file):
    text = (ROOT / file).read_text()
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert [t for t in targets if not t.startswith("http") and not ((ROOT / file).parent / t).exists()] == []


def test_guides_are_reached_from_the_readme():
    assert [guide.name for guide in (ROOT / "docs").glob("*.md") if f"docs/{guide.name})" not in README] == []


def test_benchmarks_that_are_quoted_exist():
    texts = [README, *(guide.read_text() for guide in (ROOT / "docs").glob("*.md")), CONTRIBUTING]
    quoted = {name for text in texts for name in re.findall(r"tests\.benchmarks[^`#\n]*?--only\s+(\w+)", text)}
    assert len(quoted) > 5
    assert quoted <= BENCHMARKS.keys()


def test_quick_benchmarks_write_flat_json(tmp_path):
    names = ("one_core", "drakes_steps")
    only = " ".join(f"--only {name}" for name in names)
    done = execute(f"python -m tests.benchmarks --quick {only} --json figures.json", tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["one_core.trained_ratio_with_dynamics_float32"] > 0
    assert {key.split(".")[0] for key in figures} == {*names, "machine", "git_commit"}
    assert all(not isinstance(value, dict) for value in figures.values())
