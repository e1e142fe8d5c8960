"""The policy network and the dynamics model."""

import numpy as np
import pytest
import torch

from actors.environments.noise import UniformSubstitution
from learner.dynamics import DynamicsModel
from learner.networks import MLPConfig
from learner.policy import Policy, forbidden_actions
from learner.space import SequenceSpace
from tests.reference import draw_paths, dynamics_at, fixed_space, policy_at, randomise, real_steps, variable_space

SPACES = [fixed_space(4, 4), variable_space(3, 4, 0), variable_space(2, 4, 2)]
CONFIG = MLPConfig(hidden_size=9, num_layers=2)


def all_rows(count: int, space: SequenceSpace) -> torch.Tensor:
    return torch.arange(count * (space.max_length + 1))


def step_to(model: Policy | DynamicsModel, prefix: tuple[int, ...]):
    state = model.start()
    for token in prefix:
        state = model.extend(state, torch.zeros(1, dtype=torch.int64), torch.tensor([token]))
    return model.at(state)


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("backward_head", [False, True])
@torch.no_grad()
def test_policy_equals_the_naive_one(space: SequenceSpace, backward_head: bool):
    policy = Policy(space, CONFIG, backward_head=backward_head)
    randomise(policy, seed=3)
    batch = draw_paths(space, UniformSubstitution(0.3).kernel(space.allowed), 20, seed=4)
    outputs = policy(torch.from_numpy(batch.tokens.astype(np.int64)), all_rows(20, space))
    assert (outputs.backward_logits is not None) == backward_head
    for b, t, prefix, _, _ in real_steps(batch):
        row, stepped = b * (space.max_length + 1) + t, step_to(policy, prefix)
        probabilities, log_flow, backward = policy_at(policy, prefix)
        np.testing.assert_allclose(outputs.log_policy[row].exp().numpy(), probabilities, atol=1e-5)
        np.testing.assert_allclose(stepped.log_policy[0].exp().numpy(), probabilities, atol=1e-5)
        assert float(outputs.log_flow[row]) == pytest.approx(log_flow, abs=1e-4)
        assert float(stepped.log_flow[0]) == pytest.approx(log_flow, abs=1e-4)
        if outputs.backward_logits is not None:
            np.testing.assert_allclose(outputs.backward_logits[row].numpy(), backward, atol=1e-4)
            np.testing.assert_allclose(stepped.backward_logits[0].numpy(), backward, atol=1e-4)


@pytest.mark.parametrize("space", SPACES, ids=str)
@torch.no_grad()
def test_dynamics_equal_the_naive_ones(space: SequenceSpace):
    model = DynamicsModel(space, CONFIG)
    randomise(model, seed=5)
    batch = draw_paths(space, UniformSubstitution(0.3).kernel(space.allowed), 20, seed=6)
    outputs = model(torch.from_numpy(batch.tokens.astype(np.int64)), all_rows(20, space)).exp()
    for b, t, prefix, _, _ in real_steps(batch):
        expected = dynamics_at(model, prefix)
        np.testing.assert_allclose(outputs[b * (space.max_length + 1) + t].numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(step_to(model, prefix)[0].exp().numpy(), expected, atol=1e-5)
        assert (expected[:, ~space.allowed[t]] == 0).all()


@pytest.mark.parametrize("space", SPACES, ids=str)
@torch.no_grad()
def test_an_untrained_policy_is_uniform_with_the_flows_of_reward_one(space: SequenceSpace):
    policy, state = Policy(space, CONFIG, backward_head=False), None
    for depth in range(space.max_length):
        state = policy.start() if state is None else policy.extend(state, torch.tensor([0]), torch.tensor([1]))
        outputs, allowed = policy.at(state), space.allowed[depth]
        np.testing.assert_allclose(outputs.log_policy[0].exp().numpy(), allowed / allowed.sum(), atol=1e-6)
        assert float(outputs.log_flow) == pytest.approx(float(space.log_num_completions[depth]), abs=1e-5)
    assert float(policy.at(policy.start()).log_flow) == pytest.approx(np.log(space.num_sequences), abs=1e-5)


def test_forbidden_actions_of_each_depth():
    forbidden = forbidden_actions(variable_space(2, 3, 2))
    assert forbidden[:, 2].tolist() == [True, True, False, False]
    assert not forbidden[:, :2].any()
    assert not forbidden_actions(fixed_space(2, 3)).any()


def test_forbidden_actions_leave_gradients_finite():
    space = variable_space(2, 3, 2)
    policy = Policy(space, CONFIG, backward_head=False)
    randomise(policy, seed=7)
    outputs = policy(torch.tensor([[0, 1, 2]]), torch.arange(3))
    allowed = torch.isfinite(outputs.log_policy)
    outputs.log_policy[allowed].square().sum().backward()
    gradients = torch.cat([p.grad.to_dense().reshape(-1) for p in policy.parameters() if p.grad is not None])
    assert torch.isfinite(gradients).all()
    assert gradients.abs().max() > 0
