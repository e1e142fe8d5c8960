"""What the replay buffer's process loads."""

import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest

from distributed.config import load_config
from distributed.experiment import make_replay_buffer, replay_buffer_maker

CONFIGS = Path(__file__).parents[3] / "tune_configs"
PROGRAM = """
import pickle, sys
import distributed.ray_replay

buffer = pickle.loads(sys.stdin.buffer.read())()
print(type(buffer).__name__, buffer.num_added, "torch" in sys.modules)
"""


@pytest.mark.parametrize("name", ["tfbind8", "drakes_tfbind8", "forecast_co2"])
def test_a_buffer_is_made_without_pytorch(name: str):
    config = load_config(CONFIGS / f"{name}.yaml")
    maker = cloudpickle.dumps(replay_buffer_maker(config))  # as Ray sends it
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=maker, capture_output=True, check=True)
    assert done.stdout.decode().split() == [type(make_replay_buffer(config)).__name__, "0", "False"]
