"""Exact laws of Metropolis–Hastings chains, and of designs that are made under noise."""

from itertools import product

import numpy as np
import pytest
import torch

from actors.environments.noise import UniformSubstitution
from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.oracles.tfbind8 import TFBind8Config, tfbind8_oracle
from learner.exact import TargetTree, realised_law, target_tree, total_variation
from learner.exact_baselines import law_through_noise, metropolis_law
from learner.rewards import RewardConfig, log_reward
from learner.space import SequenceSpace
from tests.reference import fixed_space, random_kernel, variable_space

SPACES = [fixed_space(2, 3), fixed_space(3, 2), fixed_space(4, 1)]


@pytest.fixture(scope="module")
def six6() -> tuple[SequenceSpace, np.ndarray, TargetTree]:
    """The space of 8-mers, log R and the target of the shipped table at exponent 3."""
    environment = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=8))
    scores = tfbind8_oracle(TFBind8Config(), environment).score(*environment.space.enumerate())
    log_rewards = log_reward(torch.from_numpy(scores), RewardConfig(exponent=3)).double().numpy()
    return environment.space, log_rewards, target_tree(environment.space, log_rewards)


def some_log_rewards(space: SequenceSpace, *, impossible: int = 0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    log_rewards = 2 * rng.normal(size=space.num_sequences)
    log_rewards[rng.permutation(space.num_sequences)[:impossible]] = -np.inf
    return log_rewards


def transition_matrix(space: SequenceSpace, log_rewards: np.ndarray) -> np.ndarray:
    """[n, n]: probability of a step from a row's to a column's sequence, one entry at a time."""
    sequences, rewards = space.enumerate()[0], np.exp(log_rewards)
    matrix = np.zeros((len(rewards), len(rewards)))
    for i, j in product(range(len(rewards)), repeat=2):
        if (sequences[i] != sequences[j]).sum() == 1:
            acceptance = 1.0 if rewards[i] == 0 else min(1.0, rewards[j] / rewards[i])
            matrix[i, j] = acceptance / (space.max_length * (space.num_tokens - 1))
    return matrix + np.diag(1 - matrix.sum(1))


# --- chains -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("impossible", [0, 1, 3])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 7, 40])
def test_law_is_a_power_of_the_dense_matrix(space, impossible, num_steps):
    log_rewards = some_log_rewards(space, impossible=impossible)
    power = np.linalg.matrix_power(transition_matrix(space, log_rewards), num_steps)
    law = metropolis_law(space, log_rewards, num_steps)
    np.testing.assert_allclose(law, np.full(len(law), 1 / len(law)) @ power, rtol=0, atol=1e-14)
    assert law.sum() == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("space", [*SPACES, fixed_space(4, 3)], ids=str)
def test_law_tends_to_the_target(space):
    log_rewards = some_log_rewards(space, impossible=1)
    law = metropolis_law(space, log_rewards, 5000)
    assert total_variation(law, target_tree(space, log_rewards).law) < 1e-6


def test_a_chain_that_stands_still_ends_the_iteration():
    space = fixed_space(3, 2)
    log_rewards = some_log_rewards(space)
    np.testing.assert_array_equal(metropolis_law(space, log_rewards, 10**12), metropolis_law(space, log_rewards, 10**6))


@pytest.mark.parametrize("level", [0.0, -800.0, -np.inf])
def test_equal_rewards_leave_the_chain_uniform(level):
    space = fixed_space(3, 3)
    np.testing.assert_allclose(metropolis_law(space, np.full(27, level), 10), np.full(27, 1 / 27), rtol=1e-12)


def test_only_ratios_of_rewards_count():
    space = fixed_space(2, 3)
    log_rewards = some_log_rewards(space, impossible=2)
    np.testing.assert_allclose(
        metropolis_law(space, log_rewards - 5000, 5), metropolis_law(space, log_rewards, 5), atol=1e-12
    )


def test_impossible_sequences_between_possible_ones_are_not_crossed():
    """AA and BB are reached from AB or BA alone, which are impossible: what starts there leaves at once, for good."""
    np.testing.assert_allclose(
        metropolis_law(fixed_space(2, 2), np.asarray([0.0, -np.inf, -np.inf, 5.0]), 9), [0.5, 0, 0, 0.5], atol=1e-15
    )


def test_the_chain_on_tfbind8_nears_its_target_step_by_step(six6):
    space, log_rewards, target = six6
    laws = [metropolis_law(space, log_rewards, num_steps) for num_steps in (0, 3, 10, 30, 100)]
    distances = [total_variation(law, target.law) for law in laws]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.4
    assert distances[-1] < 1e-4
    assert all(law.sum() == pytest.approx(1, abs=1e-12) for law in laws)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_log_rewards_that_are_none_are_rejected(wrong):
    with pytest.raises(ValueError, match="finite numbers and minus infinity"):
        metropolis_law(fixed_space(2, 1), np.asarray([0.0, wrong]), 1)


def test_other_spaces_and_sizes_are_rejected():
    space, kernel = fixed_space(2, 2), UniformSubstitution(0.1).kernel(np.ones((2, 2), bool))
    variable = variable_space(2, 2, 1)
    with pytest.raises(ValueError, match="fixed length only"):
        metropolis_law(variable, np.zeros(6), 1)
    with pytest.raises(ValueError, match="fixed length only"):
        law_through_noise(variable, np.full(6, 1 / 6), kernel)
    with pytest.raises(ValueError, match=r"log_rewards: shape \(3,\); allowed: \(4,\)"):
        metropolis_law(space, np.zeros(3), 1)
    with pytest.raises(ValueError, match=r"law: shape \(2, 2\)"):
        law_through_noise(space, np.full((2, 2), 0.25), kernel)


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_against_the_sum_over_all_pairs():
    space, rng = fixed_space(3, 2), np.random.default_rng(1)
    law, kernel, sequences = rng.dirichlet(np.ones(9)), random_kernel(space, rng), space.enumerate()[0]
    expected = np.zeros(9)
    for (i, design), (j, realised) in product(enumerate(sequences), repeat=2):
        expected[j] += law[i] * np.prod([kernel[t, design[t], realised[t]] for t in range(2)])
    made = law_through_noise(space, law, kernel)
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-15)
    assert made.sum() == pytest.approx(1, abs=1e-14)


def test_no_noise_keeps_the_law_and_full_noise_forgets_it():
    space = fixed_space(3, 4)
    law = np.random.default_rng(2).dirichlet(np.ones(81))
    np.testing.assert_array_equal(law_through_noise(space, law, UniformSubstitution(0.0).kernel(space.allowed)), law)
    forgotten = law_through_noise(space, law, UniformSubstitution(1.0).kernel(space.allowed))
    np.testing.assert_allclose(forgotten, np.full(81, 1 / 81), rtol=1e-12)


@pytest.mark.parametrize(("alpha", "designs_tv", "policy_tv"), [(0.1, 0.1087, 0.0416), (0.25, 0.2147, 0.1037)])
def test_noise_harms_designs_more_than_a_policy_that_sees_what_became_of_them(six6, alpha, designs_tv, policy_tv):
    """Both intend the target, unaware of noise; the policy conditions on the realised prefix, a design cannot."""
    space, _, target = six6
    kernel = UniformSubstitution(alpha).kernel(space.allowed)
    made = law_through_noise(space, target.law, kernel)
    assert total_variation(made, target.law) == pytest.approx(designs_tv, abs=5e-4)
    followed, _ = realised_law(space, target.conditionals, kernel)
    assert total_variation(followed, target.law) == pytest.approx(policy_tv, abs=5e-4)
