"""The learner's seeds, state, averaged weights, arithmetic and device."""

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.environments.noise import UniformSubstitution
from actors.trajectories import TrajectoryBatch
from learner.checkpoint import load_checkpoint, save_checkpoint
from learner.gflownet import GFlowNetLearner, resolve_device
from learner.precision import resolve_precision
from tests.reference import draw_paths, fixed_space, small_learner, variable_space

SPACE = variable_space(2, 4, 1)
OBJECTIVES = [{"name": "gfn_db"}, {"backward": "posterior"}, {"backward": "learned"}]


def batches(count: int, seed: int = 0, size: int = 32) -> list[TrajectoryBatch]:
    kernel = UniformSubstitution(0.25).kernel(SPACE.allowed)
    return [draw_paths(SPACE, kernel, size, seed=100 * seed + number) for number in range(count)]


def assert_same(first: GFlowNetLearner, second: GFlowNetLearner) -> None:
    assert first.step == second.step
    for ours, theirs in zip(first.evaluation_weights(), second.evaluation_weights(), strict=True):
        assert np.array_equal(ours, theirs)
    assert np.array_equal(first.weights(), second.weights())


def test_seeds_are_reproducible_and_differ():
    batch, (first, same, other) = batches(3), [small_learner(SPACE, seed=s) for s in (3, 3, 4)]
    assert not np.array_equal(first.weights(), other.weights())
    for part in batch:
        assert first.update(part) == same.update(part)
    assert_same(first, same)


def test_making_a_learner_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small_learner(SPACE)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_training_continues_bit_exactly_from_a_checkpoint(objective: dict, tmp_path: Path):
    before, after = batches(3), batches(3, seed=1)
    learner = small_learner(SPACE, objective=objective)
    for batch in before:
        learner.update(batch)
    save_checkpoint(tmp_path / "learner.pt", learner.state_dict())
    continued = small_learner(SPACE, objective=objective, seed=99)
    continued.load_state_dict(load_checkpoint(tmp_path / "learner.pt"))
    assert_same(learner, continued)
    for batch in after:
        assert learner.update(batch) == continued.update(batch)
    assert_same(learner, continued)


def test_training_continues_bit_exactly_from_a_state_in_memory():
    learner, continued = small_learner(SPACE), small_learner(SPACE, seed=99)
    learner.update(batches(1)[0])
    continued.load_state_dict(learner.state_dict())
    for batch in batches(3, seed=1):
        assert learner.update(batch) == continued.update(batch)
    assert_same(learner, continued)


def test_a_state_does_not_change_when_training_goes_on():
    learner, undone = small_learner(SPACE), small_learner(SPACE)
    first, second = batches(2)
    for each in (learner, undone):
        each.update(first)
    state = undone.state_dict()
    undone.update(second)
    undone.load_state_dict(state)
    assert learner.update(second) == undone.update(second)
    assert_same(learner, undone)


def test_the_state_of_another_network_is_refused():
    with pytest.raises(ValueError, match="do not fit a network"):
        small_learner(SPACE).load_state_dict(small_learner(fixed_space(4, 4)).state_dict())


def test_weights_are_copies():
    learner = small_learner(SPACE)
    weights, evaluation = learner.weights(), learner.evaluation_weights()
    learner.update(batches(1)[0])
    assert evaluation.step == 0
    assert np.array_equal(weights, evaluation.policy)
    assert not np.array_equal(weights, learner.weights())
    assert not np.array_equal(evaluation.dynamics, learner.evaluation_weights().dynamics)


def test_averaged_policy_is_the_moving_average_of_all_steps():
    learner, expected = small_learner(SPACE, learner={"ema_decay": 0.3}), None
    for step, batch in enumerate(batches(8)):
        learner.update(batch)
        decay = min(0.3, step / (step + 10))  # young averages forget faster; reaches .3 at step 5
        current = learner.weights().astype(np.float64)
        expected = current if expected is None else decay * expected + (1 - decay) * current
        np.testing.assert_allclose(learner.evaluation_weights().policy, expected, atol=1e-6)
    assert np.abs(expected - learner.weights()).max() > 1e-4


def test_no_averaging():
    learner = small_learner(SPACE, learner={"ema_decay": 0.0})
    for batch in batches(3):
        learner.update(batch)
    assert np.array_equal(learner.evaluation_weights().policy, learner.weights())


def test_step_size_follows_the_schedule():
    learner = small_learner(SPACE, total_steps=4, learner={"warmup_steps": 1, "final_learning_rate": 0.1})
    rates = [learner.update(batch)["learning_rate"] for batch in batches(6)]
    assert rates == pytest.approx([0.005, 0.01, 0.00775, 0.00325, 0.001, 0.001])


def test_gradients_are_clipped():
    """Adam divides by the gradient's size, so it is in the gradient itself that the limit shows."""
    learner = small_learner(SPACE, learner={"max_gradient_norm": 1e-3})
    norm = learner.update(batches(1)[0])["gradient_norm"]
    assert norm > 0.1  # the norm before clipping is what is reported
    assert float(learner.policy_weights.gradient.norm()) == pytest.approx(1e-3, rel=1e-4)
    assert float(learner.dynamics_weights.gradient.norm()) == pytest.approx(1e-3, rel=1e-4)


def test_bfloat16_stays_close_to_float32():
    full, half = small_learner(SPACE), small_learner(SPACE, learner={"precision": "bfloat16"})
    for batch in batches(20):
        exact, rounded = full.update(batch), half.update(batch)
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.05, abs=0.02)
        assert rounded["dynamics_ce"] == pytest.approx(exact["dynamics_ce"], rel=0.02)
    assert not np.array_equal(full.weights(), half.weights())
    assert half.policy_weights.vector.dtype == torch.float32
    np.testing.assert_allclose(half.weights(), full.weights(), atol=0.05)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_is_the_precision_that_the_processor_multiplies_natively(monkeypatch, capabilities, expected):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", cpu) == expected
    assert resolve_precision("float32", cpu) == torch.float32
    assert resolve_precision("bfloat16", cpu) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions of PyTorch
    assert resolve_precision("auto", cpu) == torch.float32


def test_device_is_resolved():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(ValueError, match=r"learner\.device: 'cuda'"):
        small_learner(SPACE, learner={"device": "cuda"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gpu_agrees_with_cpu(objective: dict):
    on_gpu = small_learner(SPACE, objective=objective, learner={"device": "cuda"})
    on_cpu = small_learner(SPACE, objective=objective)
    for batch in batches(5):
        gpu, cpu = on_gpu.update(batch), on_cpu.update(batch)
        assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-3)
    assert on_gpu.policy_weights.vector.device.type == "cuda"
    np.testing.assert_allclose(on_gpu.weights(), on_cpu.weights(), atol=1e-3)
    continued = small_learner(SPACE, objective=objective)
    continued.load_state_dict(on_gpu.state_dict())  # a state of the GPU goes on on the CPU
    last = batches(1, seed=9)[0]
    assert continued.update(last)["loss"] == pytest.approx(on_gpu.update(last)["loss"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_on_the_gpu():
    half = small_learner(SPACE, learner={"device": "cuda", "precision": "bfloat16"})
    full = small_learner(SPACE)
    for batch in batches(5):
        assert half.update(batch)["loss"] == pytest.approx(full.update(batch)["loss"], rel=0.05, abs=0.02)
