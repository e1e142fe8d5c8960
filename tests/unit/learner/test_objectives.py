"""Balance residuals: against loops over trajectories, at perfect flows, without noise, and their gradients."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.environments.noise import UniformSubstitution
from actors.trajectories import TrajectoryBatch
from learner import exact
from learner.objectives import balance
from learner.space import SequenceSpace
from tests.reference import (
    Tables,
    along_batch,
    db_loss,
    draw_paths,
    fixed_space,
    learned_backward,
    posterior,
    prefix_row,
    random_kernel,
    random_policies,
    random_rows,
    real_steps,
    sequence_of,
    variable_space,
)

SPACES = [fixed_space(3, 3), variable_space(2, 4, 0), variable_space(3, 3, 2)]
PADDING = 50.0
"""What fills the steps that must not count."""


class Case(NamedTuple):
    """A sampler in tables, trajectories, and the tensors of both that objectives read."""

    space: SequenceSpace
    kernel: np.ndarray
    policies: Tables
    flows: Tables
    batch: TrajectoryBatch
    log_rewards: np.ndarray
    log_flow: Tensor
    log_policy: Tensor
    log_dynamics: Tensor
    actions: Tensor
    mask: Tensor

    def taken(self, values: Tensor) -> Tensor:
        return values.gather(-1, self.actions[..., None]).squeeze(-1)

    def sgfn(self, log_pb: Tensor) -> Tensor:
        log_pf, log_dynamics = self.taken(self.log_policy), self.taken(self.log_dynamics)
        return balance.db_residuals(self.log_flow, log_pf + log_dynamics - log_pb, self.mask)

    def gfn(self) -> Tensor:
        return balance.db_residuals(self.log_flow, self.taken(self.log_policy), self.mask)

    def posterior(self) -> Tensor:
        return balance.posterior_log_pb(self.log_policy, self.log_dynamics, self.actions)


def make_case(
    space: SequenceSpace, kernel: np.ndarray, policies: Tables, flows: Tables, rewards: dict | None = None
) -> Case:
    """`rewards`: finished sequence -> log R; drawn at random without."""
    batch = draw_paths(space, kernel, 40, seed=11)
    log_rewards = np.log(batch.scores.astype(np.float64))
    if rewards is not None:
        log_rewards = np.asarray([rewards[sequence_of(space, batch, b)] for b in range(len(batch))])
    log_dynamics = torch.full((len(batch), space.max_length, space.num_actions), PADDING, dtype=torch.float64)
    for b, t, _, _, token in real_steps(batch):
        log_dynamics[b, t] = torch.from_numpy(kernel[t, :, token]).log()
    num_steps = torch.from_numpy(batch.num_steps.astype(np.int64))
    inner = torch.nn.functional.pad(along_batch(space, flows, batch, PADDING), (0, 1), value=PADDING)
    return Case(
        space, kernel, policies, flows, batch, log_rewards,
        log_flow=balance.end_flows(inner, torch.from_numpy(log_rewards), num_steps),
        log_policy=along_batch(space, [np.log(np.maximum(p, 1e-300)) for p in policies], batch, PADDING),
        log_dynamics=log_dynamics,
        actions=torch.from_numpy(batch.actions.astype(np.int64)),
        mask=balance.step_mask(num_steps, space.max_length),
    )  # fmt: skip


def random_case(space: SequenceSpace, kernel: np.ndarray | None = None) -> Case:
    rng = np.random.default_rng(5)
    flows = [rng.normal(size=space.num_tokens**t) for t in range(space.max_length)]
    return make_case(space, random_kernel(space, rng) if kernel is None else kernel, random_policies(space, rng), flows)


def perfect_case(space: SequenceSpace, kernel: np.ndarray) -> Case:
    """Rewards in proportion to a sampler's law, and the flows of that target."""
    policies = random_policies(space, np.random.default_rng(6))
    law, _ = exact.realised_law(space, policies, kernel)
    tree = exact.target_tree(space, np.log(law) + 1.7)
    tokens, lengths = space.enumerate()
    rewards = {tuple(row[:n].tolist()): np.log(p) + 1.7 for row, n, p in zip(tokens, lengths, law, strict=True)}
    return make_case(space, kernel, policies, [np.log(reach) + tree.log_z for reach in tree.reach], rewards)


def noise(space: SequenceSpace, alpha: float) -> np.ndarray:
    return UniformSubstitution(alpha).kernel(space.allowed)


def head_logits(case: Case) -> tuple[Tables, Tensor]:
    """Backward logits at s_{t+1}; in tables by s_t and realised token, [V^t, A, A]."""
    rng, actions = np.random.default_rng(8), case.space.num_actions
    tables = [rng.normal(size=(case.space.num_tokens**t, actions, actions)) for t in range(case.space.max_length)]
    logits = along_batch(case.space, tables, case.batch, PADDING)
    tokens = torch.from_numpy(case.batch.tokens.astype(np.int64))[..., None, None].expand(-1, -1, 1, actions)
    return tables, logits.gather(2, tokens).squeeze(2)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_losses_equal_loops(space: SequenceSpace):
    case, support = random_case(space), 0.15
    tables, logits = head_logits(case)

    def log_flow(prefix: tuple[int, ...]) -> float:
        return case.flows[len(prefix)][prefix_row(space, prefix)]

    def log_pi(b, t, prefix, action, token) -> float:
        return np.log(case.policies[t][prefix_row(space, prefix), action])

    def with_posterior(b, t, prefix, action, token) -> float:
        outcome = case.kernel[t, :, token]
        backward = posterior(case.policies[t][prefix_row(space, prefix)], outcome, action)
        return log_pi(b, t, prefix, action, token) + np.log(outcome[action]) - np.log(backward)

    def with_head(b, t, prefix, action, token) -> float:
        outcome = case.kernel[t, :, token]
        backward = learned_backward(tables[t][prefix_row(space, prefix), token], outcome > support, action)
        return log_pi(b, t, prefix, action, token) + np.log(outcome[action]) - np.log(backward)

    head = balance.learned_log_pb(logits, case.log_dynamics, case.actions, support=support)
    for residuals, log_ratio in [
        (case.gfn(), log_pi),
        (case.sgfn(case.posterior()), with_posterior),
        (case.sgfn(head), with_head),
    ]:
        expected = db_loss(case.batch, case.log_rewards, log_flow, log_ratio)
        assert float(balance.mean_square(residuals, case.mask)) == pytest.approx(expected, rel=1e-9)
        assert (residuals[~case.mask] == 0).all()


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, None])
def test_perfect_flows_leave_no_residual(space: SequenceSpace, alpha: float | None):
    kernel = random_kernel(space, np.random.default_rng(9)) if alpha is None else noise(space, alpha)
    case = perfect_case(space, kernel)
    assert case.sgfn(case.posterior()).abs().max() < 1e-9
    head = (case.log_policy + case.log_dynamics).clamp(min=-1e3)  # a head that has learned the posterior
    learned = balance.learned_log_pb(head, case.log_dynamics, case.actions, support=1e-9)
    assert case.sgfn(learned).abs().max() < 1e-9
    if alpha == 0:
        assert case.gfn().abs().max() < 1e-9
    else:
        assert case.gfn().abs().max() > 0.1  # it ignores the noise: not its solution


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_posterior_residual_is_that_of_marginal_balance(space: SequenceSpace):
    case = random_case(space)
    marginal = torch.zeros_like(case.log_flow[:, 1:])
    for b, t, prefix, _, token in real_steps(case.batch):
        outcome = case.policies[t][prefix_row(space, prefix)] @ case.kernel[t, :, token]
        marginal[b, t] = case.log_flow[b, t] + np.log(outcome) - case.log_flow[b, t + 1]
    torch.testing.assert_close(case.sgfn(case.posterior()), marginal, rtol=0, atol=1e-9)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_without_noise_the_intention_is_certain(space: SequenceSpace):
    case = random_case(space, noise(space, 0.0))
    head = balance.learned_log_pb(head_logits(case)[1], case.log_dynamics, case.actions, support=1e-3)
    for log_pb in (case.posterior(), head):
        assert log_pb[case.mask].abs().max() < 1e-12
        torch.testing.assert_close(case.sgfn(log_pb), case.gfn(), rtol=0, atol=1e-12)


def test_posterior_sums_to_one_over_intentions():
    rng = np.random.default_rng(1)
    log_policy = torch.from_numpy(np.log(random_rows(rng, np.ones(4, bool), 6))).view(2, 3, 4)
    log_dynamics = torch.from_numpy(np.log(rng.uniform(size=(2, 3, 4))))
    each = [balance.posterior_log_pb(log_policy, log_dynamics, torch.full((2, 3), a)).exp() for a in range(4)]
    torch.testing.assert_close(sum(each), torch.ones(2, 3, dtype=torch.float64))


def test_learned_backward_holds_no_mass_outside_its_support():
    logits = torch.tensor([[[0.3, 9.0, -0.2]]])
    log_dynamics = torch.tensor([[[0.5, 0.01, 0.2]]]).log()
    possible = [balance.learned_log_pb(logits, log_dynamics, torch.tensor([[a]]), support=0.1).exp() for a in (0, 2)]
    assert float(sum(possible)) == pytest.approx(1, abs=1e-6)
    unlikely = balance.learned_log_pb(logits, log_dynamics, torch.tensor([[1]]), support=0.1)  # but it was taken
    assert torch.isfinite(unlikely).all()
    assert float(unlikely.exp()) == pytest.approx(learned_backward(logits[0, 0].numpy(), [True, False, True], 1))


def test_ends_of_trajectories():
    num_steps, log_reward = torch.tensor([3, 1]), torch.tensor([-1.0, -2.0])
    assert balance.step_mask(num_steps, 3).tolist() == [[True] * 3, [True, False, False]]
    log_flow = balance.end_flows(torch.zeros(2, 4), log_reward, num_steps)
    assert log_flow.tolist() == [[0, 0, 0, -1], [0, -2, 0, 0]]


@pytest.mark.parametrize("backward", ["posterior", "learned"])
@pytest.mark.parametrize("space", SPACES[:2], ids=str)
def test_gradient_of_the_loss(space: SequenceSpace, backward: str):
    case = random_case(space, noise(space, 0.25))
    batch, rng = slice(0, 3), np.random.default_rng(3)
    case = case._replace(**{n: getattr(case, n)[batch] for n in ("log_dynamics", "actions", "mask")})
    num_steps = torch.from_numpy(case.batch.num_steps[batch].astype(np.int64))
    log_reward = torch.from_numpy(case.log_rewards[batch])

    def loss(logits: Tensor, flows: Tensor, head: Tensor) -> Tensor:
        log_flow = balance.end_flows(flows, log_reward, num_steps)
        current = case._replace(log_policy=logits.log_softmax(-1), log_flow=log_flow)
        learned = balance.learned_log_pb(head, case.log_dynamics, case.actions, support=1e-3)
        return balance.mean_square(current.sgfn(current.posterior() if backward == "posterior" else learned), case.mask)

    shape = (3, space.max_length, space.num_actions)
    inputs = [torch.from_numpy(rng.normal(size=s)) for s in (shape, (3, space.max_length + 1), shape)]
    inputs = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(loss, inputs)
    gradients = torch.autograd.grad(loss(*inputs), inputs, allow_unused=True)
    assert gradients[0].abs().max() > 0
    assert (gradients[0][~case.mask] == 0).all()
    assert (gradients[1][:, 0] != 0).all()  # the root is in the loss
