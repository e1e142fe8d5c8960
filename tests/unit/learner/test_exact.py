"""The exact law of a sampler, and the target as a tree."""

import numpy as np
import pytest
import torch

from actors.environments.noise import UniformSubstitution
from learner import exact
from learner.dynamics import DynamicsModel
from learner.networks import MLPConfig
from learner.policy import Policy
from learner.space import SequenceSpace
from tests.reference import (
    brute_force_law,
    dynamics_at,
    fixed_space,
    policy_at,
    prefix_row,
    random_kernel,
    random_policies,
    randomise,
    variable_space,
)

SPACES = [fixed_space(3, 3), variable_space(2, 3, 0), variable_space(2, 4, 2), variable_space(3, 2, 2)]


def sequences(space: SequenceSpace) -> list[tuple[int, ...]]:
    return [tuple(row[:length].tolist()) for row, length in zip(*space.enumerate(), strict=True)]


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.25, None])
def test_law_equals_the_walk_over_all_paths(space: SequenceSpace, alpha: float | None):
    rng = np.random.default_rng(0)
    kernel = random_kernel(space, rng) if alpha is None else UniformSubstitution(alpha).kernel(space.allowed)
    policies = random_policies(space, rng)
    law, reach = exact.realised_law(space, policies, kernel)
    expected = brute_force_law(space, policies, kernel)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(law, [expected.get(s, 0.0) for s in sequences(space)], atol=1e-12)
    for t in range(space.max_length):
        reached = np.zeros(space.num_tokens**t)
        for sequence, p in expected.items():
            if len(sequence) >= t:
                reached[prefix_row(space, sequence[:t])] += p
        np.testing.assert_allclose(reach[t], reached, atol=1e-12)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_target_tree_against_sums_over_sequences(space: SequenceSpace):
    rng = np.random.default_rng(1)
    log_rewards = rng.normal(size=space.num_sequences) - 400  # exp of it underflows
    log_rewards[rng.integers(space.num_sequences)] = -np.inf
    tree = exact.target_tree(space, log_rewards)
    assert tree.log_z == pytest.approx(np.log(np.exp(log_rewards + 400).sum()) - 400, abs=1e-10)
    np.testing.assert_allclose(tree.law, np.exp(log_rewards - tree.log_z), rtol=1e-9)
    law = dict(zip(sequences(space), tree.law, strict=True))
    for prefix in {s[:t] for s in law for t in range(min(len(s) + 1, space.max_length))}:
        row, t = prefix_row(space, prefix), len(prefix)
        below = sum(p for s, p in law.items() if s[:t] == prefix)
        assert tree.reach[t][row] == pytest.approx(below, abs=1e-12)
        for token in range(space.num_tokens):
            child = sum(p for s, p in law.items() if s[: t + 1] == (*prefix, token))
            assert tree.conditionals[t][row, token] * below == pytest.approx(child, abs=1e-12)
        if space.variable_length:
            assert tree.conditionals[t][row, space.end] * below == pytest.approx(law.get(prefix, 0.0), abs=1e-12)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_following_the_target_without_noise_gives_the_target(space: SequenceSpace):
    tree = exact.target_tree(space, np.random.default_rng(2).normal(size=space.num_sequences))
    law, reach = exact.realised_law(space, tree.conditionals, UniformSubstitution(0.0).kernel(space.allowed))
    np.testing.assert_allclose(law, tree.law, atol=1e-12)
    for ours, theirs in zip(reach, tree.reach, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_unreachable_prefixes_have_empty_conditionals():
    tree = exact.target_tree(fixed_space(2, 2), np.asarray([0.0, 0.0, -np.inf, -np.inf]))
    assert tree.conditionals[1].tolist() == [[0.5, 0.5], [0, 0]]
    assert tree.reach[1].tolist() == [1, 0]


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("chunk", [3, 10_000])
def test_policy_tables_list_every_prefix(space: SequenceSpace, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exact, "CHUNK", chunk)
    policy = Policy(space, MLPConfig(hidden_size=6, num_layers=2), backward_head=True)
    randomise(policy, seed=3)
    tables = exact.policy_tables(policy)
    assert [table.shape for table in tables] == [
        (space.num_tokens**t, space.num_actions) for t in range(space.max_length)
    ]
    for prefix in {s[:t] for s in sequences(space) for t in range(min(len(s) + 1, space.max_length))}:
        expected, _, _ = policy_at(policy, prefix)
        np.testing.assert_allclose(tables[len(prefix)][prefix_row(space, prefix)], expected, atol=1e-5)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_dynamics_error_is_the_mean_over_what_is_reached(space: SequenceSpace):
    rng = np.random.default_rng(4)
    model, kernel = DynamicsModel(space, MLPConfig(hidden_size=6, num_layers=2)), random_kernel(space, rng)
    randomise(model, seed=5)
    _, reach = exact.realised_law(space, random_policies(space, rng), kernel)
    steps = []
    for t in range(space.max_length):
        total = 0.0
        for prefix in {s[:t] for s in sequences(space) if len(s) >= t}:
            distances = 0.5 * np.abs(dynamics_at(model, prefix) - kernel[t]).sum(1)
            possible = [distances[a] for a in range(space.num_actions) if space.allowed[t, a]]
            total += reach[t][prefix_row(space, prefix)] / reach[t].sum() * np.mean(possible)
        steps.append(total)
    assert exact.dynamics_error(model, kernel, reach) == pytest.approx(np.mean(steps), abs=1e-5)


def test_perfect_dynamics_have_no_error():
    space = variable_space(2, 3, 1)
    model, kernel = DynamicsModel(space, MLPConfig(hidden_size=3)), UniformSubstitution(1.0).kernel(space.allowed)
    _, reach = exact.realised_law(space, random_policies(space, np.random.default_rng(6)), kernel)
    assert exact.dynamics_error(model, kernel, reach) == pytest.approx(0, abs=1e-6)  # untrained: uniform
    with torch.no_grad():
        model.network.head.bias[0] = 50.0
    assert exact.dynamics_error(model, kernel, reach) > 0.1


def test_divergences_of_known_laws():
    p, q = np.asarray([0.5, 0.5, 0.0]), np.asarray([0.25, 0.5, 0.25])
    assert exact.total_variation(p, q) == pytest.approx(0.25)
    assert exact.kl_divergence(p, q) == pytest.approx(0.5 * np.log(2))
    assert exact.kl_divergence(q, p) == np.inf
    assert exact.kl_divergence(p, p) == 0


def test_jensen_shannon_bounds():
    p, q, r = np.asarray([1.0, 0, 0]), np.asarray([0, 0.5, 0.5]), np.asarray([0.4, 0.6, 0])
    assert exact.jensen_shannon(p, q) == pytest.approx(np.log(2))  # disjoint: the largest
    assert exact.jensen_shannon(p, p) == 0
    assert 0 < exact.jensen_shannon(p, r) < np.log(2)
    assert exact.jensen_shannon(p, r) == pytest.approx(exact.jensen_shannon(r, p))
