"""A trial of a sweep, as Ray Tune drives it, without Ray."""

from pathlib import Path

import pytest

from distributed.run_folder import RunFolder
from distributed.trial import STOP_FILE, TrialRun, TrialSetup
from tests.conftest import TOY
from tests.waiting import wait_for


@pytest.fixture
def trial(tmp_path: Path) -> TrialRun:
    setup = TrialSetup(
        key="key", base=TOY | {"tracking": {"mlflow": False}}, space={}, seeds=(0,), folder=tmp_path,
        working_directory=tmp_path, mlflow_uri="", parent=None, metric="excess_kl", mutates=False,
    )  # fmt: skip
    return TrialRun(setup, setup.config({"run.num_learner_steps": 500}, "trial"), "trial")


def test_an_interrupted_trial_is_not_done_however_often_it_is_asked(trial, tmp_path):
    assert "done" not in trial.next_figures()
    (tmp_path / STOP_FILE).touch()
    wait_for((tmp_path / "trial" / "summary.json").exists, seconds=60)  # nobody asks it while it ends
    assert RunFolder(tmp_path / "trial").read_summary()["status"] == "interrupted"
    for _ in range(3):  # Tune may, before it notices that it is to stop; a trial that is done would not be gone on with
        figures = trial.next_figures()
        assert figures["done"] is False
        assert figures["num_learner_steps"] < 500
        assert "excess_kl" in figures
    assert trial.save().is_dir()


def test_a_trial_that_took_all_its_steps_is_done(trial):
    figures = trial.next_figures()
    while "done" not in figures:
        figures = trial.next_figures()
    assert (figures["done"], figures["num_learner_steps"]) == (True, 500)
