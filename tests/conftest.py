"""Fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """Every test sees the same random numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty: run folders and the default MLflow store land here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


TOY = {
    "run": {"backend": "serial", "num_learner_steps": 24, "name": "toy"},
    "environment": {"alphabet": "AB", "length": 3, "noise": 0.2},
    "oracle": {"name": "callable", "function": "tests.oracles:count_b"},
    "network": {"hidden_size": 16, "num_layers": 2},
    "learner": {"batch_size": 32},
    "dynamics": {"batch_size": 16},
    "actors": {"batch_size": 64},
    "evaluation": {"exact": "always", "num_samples": 64, "every_steps": 8},
    "tracking": {"mlflow": False, "log_every_steps": 2},
}
"""A task of eight sequences that trains in a second."""


@pytest.fixture
def toy() -> Callable[..., Any]:
    """Makes the toy's configuration, with dotted keys replaced: toy(**{"run.seed": 1})."""
    import yaml

    from distributed.config import apply_overrides, validate

    def make(**changes: Any) -> Any:
        return validate(apply_overrides(TOY, [(key, yaml.safe_dump(value)) for key, value in changes.items()]))

    return make


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Ray runtime for all tests that need one in this process; yields the folder that its oracle functions know."""
    import ray

    folder = tmp_path_factory.mktemp("oracle")
    os.environ["ORACLE_FOLDER"] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=300_000_000, log_to_driver=False)
    yield folder
    ray.shutdown()


@pytest.fixture
def oracle_folder(ray_session: Path) -> Path:
    """A folder, empty now, by which a test talks to its oracle function in other processes."""
    for file in ray_session.iterdir():
        file.unlink()
    return ray_session
