"""What the C library does with the memory that a step frees."""

import platform
import subprocess
import sys

import pytest

from learner import memory

STEPS = """
import ctypes, resource, sys
from learner.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)

def step():
    blocks = [libc.malloc(ctypes.c_size_t(4 << 20)) for _ in range(20)]
    for block in blocks:
        ctypes.memset(block, 1, 4 << 20)
    for block in reversed(blocks):
        libc.free(block)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_step_that_follows_another_finds_its_memory_there():
    def faults(how: str) -> float:
        """Pages that were fetched a step; a step uses 80 MiB, 20,480 pages of 4 KiB."""
        done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert faults("keep") < 100
    assert faults("plain") > 1000


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory.sys, "platform", "win32")
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    memory.keep_freed_memory()


def test_parameters_are_counted_without_their_values_and_without_the_compiler():
    """torch's compiler takes a second to load, in every command."""
    program = """
import sys
from distributed import config, experiment
from learner.memory import count_parameters

for settings in ({}, {"network": {"name": "transformer"}}):
    checked = config.validate(config.read_yaml(config.DEFAULT_CONFIG) | settings)
    build = lambda: experiment.make_policy(checked, experiment.make_environment(checked))
    experiment.check_memory(checked, training=True)
    assert count_parameters(build) == sum(parameter.numel() for parameter in build().parameters()) > 0
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
