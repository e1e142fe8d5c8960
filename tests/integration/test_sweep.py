"""`python -m distributed.sweep` on real Ray Tune and a real MLflow store."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
import yaml
from mlflow.tracking import MlflowClient

from distributed import run, sweep
from distributed.checkpoints import load_state
from distributed.config import DEFAULT_CONFIG, ConfigError
from distributed.mlflow_store import PARENT_TAG
from distributed.run_folder import RunFolder
from tests.conftest import TOY
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TRACKED = TOY | {"tracking": {"log_every_steps": 4}, "run": {"backend": "serial", "num_learner_steps": 32, "name": "s"}}
NESTED = {
    "run": TRACKED["run"] | {"backend": "ray"},
    "actors": {"batch_size": 64, "num_rollout_actors": 2, "num_cpus": 0.1, "learner_num_cpus": 0.25},
}
OURS = ("Trial", "ResourceTrainable", "LearnerActor", "ReplayBufferActor", "RolloutActor")


def write(folder: Path, section: dict, **sections: dict) -> str:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(TRACKED | sections | {"sweep": section}))
    return str(file)


def rows(folder: Path, name: str = "results") -> list[dict[str, str]]:
    with open(folder / "runs" / "s" / f"{name}.csv") as file:
        return list(csv.DictReader(file))


def mlflow_runs(folder: Path) -> tuple[list, dict[str, list]]:
    """Parents, and for each its children, as the client reads them back."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("default")
    found = client.search_runs([experiment.experiment_id])
    parents = [r for r in found if PARENT_TAG not in r.data.tags]
    return parents, {p.info.run_id: [r for r in found if r.data.tags.get(PARENT_TAG) == p.info.run_id] for p in parents}


def alive() -> list[str]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(f"ray::{name}" in title for name in OURS):
            found.append(title)
    return found


@pytest.fixture
def all_gone(ray_session):
    """After the test, no actor of a trial is alive and no resources are reserved."""
    yield
    reserved = ray.util.placement_group_table
    wait_for(lambda: not alive() and all(g["state"] != "CREATED" for g in reserved().values()), why=alive, seconds=60)


def test_successive_halving_with_nested_actors(in_tmp_path, all_gone, capsys):
    space = {"objective.gamma": {"uniform": [0.1, 0.9]}, "learner.learning_rate": {"loguniform": [1e-5, 3e-2]}}
    scheduler = {"name": "asha", "grace_steps": 8, "reduction_factor": 2}
    section = {"space": space, "num_samples": 4, "max_concurrent": 2, "scheduler": scheduler}
    objective = {"name": "sgfn_kl"}
    file = write(
        in_tmp_path, section, **(NESTED | {"objective": objective, "run": NESTED["run"] | {"num_learner_steps": 200}})
    )
    seen = set()
    stop = _watch_reservations(seen)
    assert sweep.main([file]) == 0
    stop()
    results = rows(in_tmp_path)
    statuses = [row["status"] for row in results]
    assert len(results) == 4
    assert set(statuses) == {"done", "stopped"}
    assert max(int(float(row["num_learner_steps"])) for row in results if row["status"] == "stopped") < 200
    assert min(int(float(row["num_learner_steps"])) for row in results if row["status"] == "done") >= 200
    assert (0.25, 0.25, 0.1, 0.1) in seen  # driver, learner and both rollout actors reserve together
    (parent,), children = mlflow_runs(in_tmp_path)
    assert parent.info.status == "FINISHED"
    trials = children[parent.info.run_id]
    assert sorted(t.data.tags["ended"] for t in trials) == sorted(statuses)
    assert {t.info.status for t in trials} == {"FINISHED"}
    by_id = {row["trial_id"]: row for row in results}
    for trial in trials:
        row = by_id[trial.data.tags["trial_id"]]
        assert float(trial.data.params["objective.gamma"]) == pytest.approx(float(row["objective.gamma"]))
        assert trial.data.metrics["final_excess_kl"] == pytest.approx(float(row["excess_kl"]))
        assert {"environment.noise", "actors.num_rollout_actors", "run.seed"} <= set(trial.data.params)
    client = MlflowClient(f"sqlite:///{in_tmp_path}/mlflow.db")
    for trial in trials:
        assert {"config.yaml", "summary.json", "plots", "model"} <= {
            a.path for a in client.list_artifacts(trial.info.run_id)
        }
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {
        "results.csv",
        "best.yaml",
        "sweep.png",
        "points.csv",
    }
    best = min(results, key=lambda row: float(row["excess_kl"]))
    assert parent.data.metrics["best_excess_kl"] == pytest.approx(float(best["excess_kl"]))
    assert "stopped" in capsys.readouterr().out
    assert (
        run.main(["runs/s/best.yaml", "--run.name", "again", "--run.num_learner_steps", "8", "--run.backend", "serial"])
        == 0
    )
    again = yaml.safe_load((in_tmp_path / "runs/again/config.yaml").read_text())
    assert again["objective"]["gamma"] == pytest.approx(float(best["objective.gamma"]))


def _watch_reservations(seen: set):
    import threading

    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.3):
            for group in ray.util.placement_group_table().values():
                if group["state"] == "CREATED":
                    seen.add(tuple(bundle["CPU"] for _, bundle in sorted(group["bundles"].items())))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def stop() -> None:
        done.set()
        thread.join()

    return stop


def test_three_trials_at_once_on_a_fresh_store_and_one_whose_oracle_raises(in_tmp_path, all_gone, capsys):
    functions = [f"tests.oracles:{name}" for name in ("count_b", "always_raises", "negative_for_aaa")]
    section = {
        "space": {"oracle.function": {"grid": functions}},
        "num_samples": 1,
        "max_concurrent": 3,
        "seeds": [3, 4],
    }
    assert not (in_tmp_path / "mlflow.db").exists()
    file = write(in_tmp_path, section, evaluation=TOY["evaluation"] | {"exact": "never"})
    assert sweep.main([file, "--sweep.metric", "mean_score", "--sweep.mode", "max"]) == 1
    results = rows(in_tmp_path)
    failed = [row for row in results if row["status"] == "failed"]
    assert [row["oracle.function"] for row in failed] == ["tests.oracles:always_raises"] * 2
    assert all("the assay is on fire" in row["error"] for row in failed)
    assert sum(row["status"] == "done" for row in results) == 4
    assert sorted(row["run.seed"] for row in results) == ["3"] * 3 + ["4"] * 3
    (parent,), children = mlflow_runs(in_tmp_path)
    assert len(children[parent.info.run_id]) >= 4
    for child in children[parent.info.run_id]:
        broken = child.data.params["oracle.function"] == "tests.oracles:always_raises"
        assert child.info.status == ("FAILED" if broken else "FINISHED")
    points = rows(in_tmp_path, "points")
    assert points[-1]["oracle.function"] == "tests.oracles:always_raises"
    assert [point["num_trials"] for point in points] == ["2", "2", "2"]
    assert "2 failed" in capsys.readouterr().out


def test_population_based_training_changes_gamma_and_goes_on_from_better_trials(in_tmp_path, all_gone):
    section = {
        "space": {"objective.gamma": {"uniform": [0.1, 0.9]}, "learner.learning_rate": {"loguniform": [1e-5, 3e-2]}},
        "num_samples": 3,
        "scheduler": {"name": "pbt", "perturbation_steps": 24, "quantile": 0.34},
    }
    sections = {"run": TRACKED["run"] | {"num_learner_steps": 96}, "objective": {"name": "sgfn_kl"}}
    assert sweep.main([write(in_tmp_path, section, **sections)]) == 0
    folders = sorted((in_tmp_path / "runs/s/trials").glob("*_*"))
    assert len(folders) == 3
    taken = {}
    for folder in folders:
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        gammas = [record["objective.gamma"] for record in metrics if "objective.gamma" in record]
        assert all(0.1 <= gamma <= 0.9 for gamma in gammas)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert gammas[-1] == pytest.approx(config["objective"]["gamma"])
        row = next(row for row in rows(in_tmp_path) if row["trial_id"] == folder.name)
        assert float(row["objective.gamma"]) == pytest.approx(gammas[-1])
        assert json.loads((folder / "summary.json").read_text())["status"] == "done"
        if (folder / "taken.json").exists():
            taken[folder.name] = gammas
            donor = json.loads((folder / "taken.json").read_text())[-1]["run_key"].split("/")[1]
            assert donor != folder.name
            assert donor in {f.name for f in folders}
    assert taken, "no trial went on from another"
    assert all(len(set(gammas)) > 1 for gammas in taken.values())
    (parent,), children = mlflow_runs(in_tmp_path)
    client = MlflowClient(f"sqlite:///{in_tmp_path}/mlflow.db")
    runs = {child.data.tags["trial_id"]: child for child in children[parent.info.run_id]}
    assert len(runs) == len(children[parent.info.run_id]) == 3  # one run each, however often it was taken up
    for name, gammas in taken.items():
        history = client.get_metric_history(runs[name].info.run_id, "objective.gamma")
        assert gammas[-1] == pytest.approx(max(history, key=lambda m: (m.timestamp, m.step)).value)
    assert {child.info.status for child in runs.values()} == {"FINISHED"}


@pytest.mark.parametrize(
    "name",  # the README's test runs sweep_gamma
    sorted({path.stem for path in DEFAULT_CONFIG.parent.glob("sweep_*.yaml")} - {"sweep_gamma"}),
)
def test_the_sweeps_that_come_with_the_program(name, in_tmp_path, all_gone):
    short = {"run.name": "s", "run.backend": "serial", "run.num_learner_steps": 24, "evaluation.every_steps": 8}
    short |= {"evaluation.num_samples": 64, "sweep.seeds": "[0]"}
    short |= {"network.hidden_size": 16, "network.num_layers": 2}
    if "forecast" in name:  # two of its points
        short |= {"sweep.space": "{reward.exponent: {grid: [4, 16]}}"}
    else:
        short |= {"network.kmer_sizes": "[]", "sweep.num_samples": 3}
    if "asha" in (DEFAULT_CONFIG.parent / f"{name}.yaml").read_text():
        short |= {"sweep.scheduler.grace_steps": 8}
    if "pbt" in name:
        short |= {"sweep.scheduler.perturbation_steps": 8}
    words = [word for key, value in short.items() for word in (f"--{key}", str(value))]
    assert sweep.main([str(DEFAULT_CONFIG.parent / f"{name}.yaml"), *words, "--tracking.mlflow", "false"]) == 0
    assert {row["status"] for row in rows(in_tmp_path)} <= {"done", "stopped"}
    assert (in_tmp_path / "runs/s/sweep.png").exists()
    best = yaml.safe_load((in_tmp_path / "runs/s/best.yaml").read_text())
    assert best["oracle"]["factor"] == "SIX6_REF_R1"


@pytest.mark.parametrize("search", ["optuna", "hyperopt"])
def test_searches_that_learn_from_earlier_trials(search, in_tmp_path, all_gone):
    pytest.importorskip(search)
    space = {
        "reward.exponent": {"quniform": [1, 3, 0.5]},
        "objective.name": {"choice": ["subtb", "tb"]},
        "learner.batch_size": {"randint": [16, 33]},
    }
    section = {"space": space, "num_samples": 3, "search": search, "seeds": [0, 1], "max_concurrent": 2}
    file = write(in_tmp_path, section, tracking={"mlflow": False})
    assert sweep.main([file]) == 0
    results = rows(in_tmp_path)
    assert sorted(row["run.seed"] for row in results) == ["0"] * 3 + ["1"] * 3
    assert len(rows(in_tmp_path, "points")) <= 3
    for row in results:
        config = yaml.safe_load((in_tmp_path / "runs/s/trials" / row["trial_id"] / "config.yaml").read_text())
        assert config["run"]["seed"] == int(row["run.seed"])
        assert config["reward"]["exponent"] == pytest.approx(float(row["reward.exponent"]))
        assert float(row["reward.exponent"]) in (1, 1.5, 2, 2.5, 3)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"metric": "exact_tvv"}, r"sweep.metric: got 'exact_tvv'; this experiment is judged by: .*excess_kl"),
        ({"space": {"objective.gama": {"grid": [1]}}}, "unknown key"),
        ({"space": {"environment.noise": {"uniform": [0.5, 1.5]}}}, "1.5 is not allowed"),
        ({"space": {"oracle.function": {"grid": ["nowhere:f"]}}, "metric": "sampled"}, "sweep.metric"),
    ],
)
def test_a_wrong_sweep_is_an_error_before_anything_starts(section, message, in_tmp_path):
    section = {"space": {"reward.exponent": {"grid": [1, 2]}}} | section
    with pytest.raises(ConfigError, match=message):
        sweep.main([write(in_tmp_path, section)])
    assert not (in_tmp_path / "runs").exists()
    assert not (in_tmp_path / "mlflow.db").exists()


def test_a_metric_known_only_at_the_end_goes_with_fifo(in_tmp_path):
    section = {"space": {"reward.exponent": {"grid": [1]}}, "metric": "mean_score", "scheduler": {"name": "asha"}}
    with pytest.raises(ConfigError, match=r"only at the end .* excess_kl"):
        sweep.main([write(in_tmp_path, section)])


def test_trials_that_can_never_be_placed_are_an_error_at_once(in_tmp_path, ray_session):
    section = {"space": {"actors.num_rollout_actors": {"grid": [1, 100]}}, "num_samples": 1}
    with pytest.raises(ConfigError, match=r"a trial reserves 51.25 CPUs.*have 8 CPUs"):
        sweep.main([write(in_tmp_path, section, run=NESTED["run"])])


def test_values_that_are_too_much_only_together_are_found_too(in_tmp_path, ray_session):
    space = {"actors.num_rollout_actors": {"grid": [1, 8]}, "actors.num_cpus": {"grid": [0.25, 2]}}
    with pytest.raises(ConfigError, match=r"a trial reserves 17.25 CPUs"):
        sweep.main([write(in_tmp_path, {"space": space, "num_samples": 1}, run=NESTED["run"])])
    assert not (in_tmp_path / "runs" / "s").exists()  # the name can be used again


def test_a_store_address_with_a_password_is_refused(in_tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        sweep.main([write(in_tmp_path, {"space": {"reward.exponent": {"grid": [1]}}})])
    assert "secret" not in str(caught.value)


def test_a_run_without_the_figure_fails_and_fails_again_when_resumed(in_tmp_path, all_gone, capsys):
    """Without the exact law there is no excess KL; two are to run at a time, where there is room for one."""
    section = {"space": {"evaluation.exact": {"grid": ["always", "never"]}}, "num_samples": 1}
    section |= {"max_concurrent": 2, "trial_num_cpus": 5}
    file = write(in_tmp_path, section, tracking={"mlflow": False})
    assert sweep.main([file]) == 1
    assert "a trial reserves 5 CPUs, so 1 run at a time here" in capsys.readouterr().err
    assert sweep.main(["--resume", "runs/s"]) == 1
    assert [(row["evaluation.exact"], row["status"]) for row in rows(in_tmp_path)] == [
        ("always", "done"),
        ("never", "failed"),
    ]
    assert "without a finite excess_kl" in rows(in_tmp_path)[1]["error"]


@pytest.mark.parametrize("search", ["optuna"])
def test_a_point_that_a_search_should_not_have_chosen_fails_alone(search, in_tmp_path, all_gone):
    space = {"replay.replay_share": {"choice": [0.5]}, "replay.priority_exponent": {"choice": [0, 2]}}
    space["dynamics.mode"] = {"choice": ["off_policy", "on_policy"]}
    section = {"space": space, "num_samples": 6, "search": search}
    assert sweep.main([write(in_tmp_path, section, tracking={"mlflow": False})]) in (0, 1)
    bad = [r for r in rows(in_tmp_path) if (r["replay.priority_exponent"], r["dynamics.mode"]) == ("2", "on_policy")]
    assert {row["status"] for row in bad} <= {"failed"}
    assert sum(row["status"] == "done" for row in rows(in_tmp_path)) == 6 - len(bad)


def start(*arguments: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "distributed.sweep", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TUNE_GLOBAL_CHECKPOINT_S": "1"}
    environment["SLOW_MARKER"] = str(folder / "slow")
    with open(folder / "stderr.txt", "a") as stderr:
        return subprocess.Popen(
            command, cwd=folder, stderr=stderr, stdout=stderr, start_new_session=True, env=environment
        )


def progress(folder: Path) -> dict[str, int]:
    """Trial -> step of its newest checkpoint."""
    checkpoints = sorted((folder / "runs/s/trials").glob("*/checkpoints/step_*"))
    return {path.parts[-3]: int(path.name[5:]) for path in checkpoints}


def done_trials(folder: Path) -> dict[str, float]:
    """Trial -> time at which its summary was written, of those that are done."""
    summaries = (folder / "runs/s/trials").glob("*/summary.json")
    return {p.parts[-2]: p.stat().st_mtime for p in summaries if json.loads(p.read_text())["status"] == "done"}


def steps_of(trial: Path) -> list[int]:
    """Steps that have a loss, as they were recorded."""
    records = map(json.loads, (trial / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if "loss" in record]


def test_a_sweep_goes_on_after_its_driver_was_killed_and_then_interrupted(in_tmp_path):
    section = {"space": {"run.num_learner_steps": {"grid": [16, 500, 501]}, "objective.gamma": {"choice": [0.5]}}}
    sections = {
        "run": TRACKED["run"] | {"save_every_seconds": 0.2},
        "oracle": {"name": "callable", "function": "tests.oracles:slow_while_told", "cache_size": 0},
    }
    file = write(in_tmp_path, section | {"num_samples": 1, "max_concurrent": 2}, **sections)
    (in_tmp_path / "slow").touch()  # 50 ms a step, so that no long trial ends before it is interrupted
    process = start(file, folder=in_tmp_path)
    patience = {"seconds": 200, "process": process, "why": (in_tmp_path / "stderr.txt").read_text}
    # the short trial is done, which Tune has had time to write down, and the next is under way
    wait_for(lambda: done_trials(in_tmp_path) and max(progress(in_tmp_path).values()) > 60, **patience)
    time.sleep(2)
    earlier_done, earlier = done_trials(in_tmp_path), progress(in_tmp_path)
    process.kill()
    assert process.wait(120) == -signal.SIGKILL
    running = [trial for trial, step in earlier.items() if trial not in earlier_done and step > 0]
    assert running

    process = start("--resume", "runs/s", folder=in_tmp_path)
    patience["process"] = process
    wait_for(lambda: all(progress(in_tmp_path)[trial] > earlier[trial] + 40 for trial in running), **patience)
    assert set(done_trials(in_tmp_path)) == set(earlier_done)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    (parent,), children = mlflow_runs(in_tmp_path)
    assert parent.info.status == "KILLED"
    assert {c.info.status for c in children[parent.info.run_id]} == {"FINISHED", "KILLED"}
    reached = progress(in_tmp_path)

    (in_tmp_path / "slow").unlink()
    assert start("--resume", "runs/s", folder=in_tmp_path).wait(300) == 0, (in_tmp_path / "stderr.txt").read_text()
    results = rows(in_tmp_path)
    assert [row["status"] for row in results] == ["done"] * 3
    for trial, when in earlier_done.items():
        assert done_trials(in_tmp_path)[trial] == when  # finished trials stay finished
    for trial in running:
        folder = in_tmp_path / "runs/s/trials" / trial
        steps = steps_of(folder)
        assert steps == sorted(set(steps))  # one history
        assert steps[0] < 10  # from the beginning
        newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
        assert load_state(newest)["wall_seconds"] > 0
    (parent,), children = mlflow_runs(in_tmp_path)
    trials = [child.data.tags["trial_id"] for child in children[parent.info.run_id]]
    assert sorted(trials) == sorted({row["trial_id"] for row in results})  # continued, not duplicated
    assert {r.info.status for r in (parent, *children[parent.info.run_id])} == {"FINISHED"}
    assert reached.keys() <= set(trials)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(in_tmp_path) in " ".join(p.info["cmdline"] or ())]
    assert not left


def test_a_sweep_that_cannot_be_resumed_now_is_not_deleted(in_tmp_path, monkeypatch):
    """Killed before its first trial, and then its cluster does not answer, or another process has it."""
    section = {"space": {"reward.exponent": {"grid": [1]}}}
    file = write(in_tmp_path, section, tracking={"mlflow": False})

    def killed(*_: object, **__: object) -> int:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run_sweep", killed)
        with pytest.raises(SystemExit):
            sweep.main([file])
    with RunFolder(in_tmp_path / "runs/s").locked(), pytest.raises(ConfigError, match="another process"):
        sweep.main(["--resume", "runs/s"])
    assert (in_tmp_path / "runs/s/sweep.yaml").exists()


def test_resume_names_what_is_wrong(in_tmp_path):
    with pytest.raises(ConfigError, match="not the folder of a sweep"):
        sweep.main(["--resume", str(in_tmp_path)])
    (in_tmp_path / "sweep.yaml").write_text("key: a\n")
    with pytest.raises(ConfigError, match="damaged"):
        sweep.main(["--resume", str(in_tmp_path)])
    with pytest.raises(ConfigError, match="no keys can be changed"):
        sweep.main(["--resume", str(in_tmp_path), "--run.seed", "1"])
    with pytest.raises(ConfigError, match="either a sweep's YAML file"):
        sweep.main([])
    (in_tmp_path / "plain.yaml").write_text("run: {seed: 1}\n")
    with pytest.raises(ConfigError, match="has no section sweep"):
        sweep.main(["plain.yaml"])
