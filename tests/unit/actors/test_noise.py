"""Noise processes and the sampler that draws from their kernels.

Frequencies are judged by chi-square tests at level 1e-4 with fixed seeds; a new seed raises a false alarm in one of
10,000 tests.
"""

import numpy as np
import pytest
from scipy import stats

from actors.environments.noise import NoiseSampler, UniformSubstitution
from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from learner.space import SequenceSpace

FALSE_ALARM = 1e-4
FIXED = SequenceSpace(num_tokens=4, max_length=3)
VARIABLE = SequenceSpace(num_tokens=3, max_length=4, variable_length=True, min_length=2)


def test_kernel_of_four_letters_by_hand():
    kernel = UniformSubstitution(0.2).kernel(FIXED.allowed)
    assert kernel.shape == (3, 4, 4)
    np.testing.assert_allclose(kernel, np.broadcast_to(0.8 * np.eye(4) + 0.05, (3, 4, 4)), rtol=0, atol=1e-15)


def test_kernel_knows_only_the_allowed_actions():
    kernel = UniformSubstitution(0.3).kernel(VARIABLE.allowed)
    np.testing.assert_allclose(kernel[0], [[0.8, 0.1, 0.1, 0], [0.1, 0.8, 0.1, 0], [0.1, 0.1, 0.8, 0], [0] * 4])
    np.testing.assert_allclose(kernel[2], 0.7 * np.eye(4) + 0.075)


@pytest.mark.parametrize("space", [FIXED, VARIABLE])
@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.25, 0.9, 1.0])
def test_rows_of_allowed_actions_sum_to_one_and_others_are_empty(space, alpha):
    kernel = UniformSubstitution(alpha).kernel(space.allowed)
    np.testing.assert_allclose(kernel.sum(-1), space.allowed, rtol=0, atol=1e-12)
    assert (kernel >= 0).all()
    assert not kernel[np.broadcast_to(~space.allowed[:, None, :], kernel.shape)].any()


def test_without_noise_the_kernel_is_the_identity():
    np.testing.assert_array_equal(UniformSubstitution(0.0).kernel(FIXED.allowed), np.broadcast_to(np.eye(4), (3, 4, 4)))


def test_full_noise_forgets_the_intention():
    np.testing.assert_array_equal(UniformSubstitution(1.0).kernel(FIXED.allowed), np.full((3, 4, 4), 0.25))


@pytest.mark.parametrize("space", [FIXED, VARIABLE])
@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
def test_realised_frequencies_follow_the_kernel(space, alpha):
    kernel = UniformSubstitution(alpha).kernel(space.allowed)
    sampler, rng, count = NoiseSampler(kernel), np.random.default_rng(1), 20_000
    for step, action in np.argwhere(space.allowed):
        realised = sampler.realise(step, np.full(count, action), rng.random(count, dtype=np.float32))
        seen, possible = np.bincount(realised, minlength=space.num_actions), space.allowed[step]
        assert not seen[~possible].any()
        result = stats.chisquare(seen[possible], count * kernel[step, action, possible])
        assert result.pvalue > FALSE_ALARM, (step, action)


def test_realised_frequencies_of_mixed_actions_belong_to_their_own_rows():
    kernel = np.array([[[0.9, 0.1, 0.0], [0.0, 0.5, 0.5], [0.25, 0.25, 0.5]]])
    actions, rng = np.tile([0, 1, 2], 20_000), np.random.default_rng(2)
    realised = NoiseSampler(kernel).realise(0, actions, rng.random(len(actions)))
    for action in range(3):
        seen, possible = np.bincount(realised[actions == action], minlength=3), kernel[0, action] > 0
        assert seen[~possible].sum() == 0
        assert stats.chisquare(seen[possible], 20_000 * kernel[0, action, possible]).pvalue > FALSE_ALARM


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_extreme_uniform_numbers_never_give_a_forbidden_outcome(alpha, dtype):
    """Cumulated rows may end just below one; the outcome after them is forbidden before the minimal length."""
    sampler = NoiseSampler(UniformSubstitution(alpha).kernel(VARIABLE.allowed))
    for uniform in (dtype(0), np.nextafter(dtype(1), dtype(0))):
        realised = sampler.realise(0, np.arange(3), np.full(3, uniform))
        assert (realised < VARIABLE.end).all(), uniform


@pytest.mark.parametrize("variable_length", [False, True])
def test_noise_switched_off_realises_the_intention(variable_length):
    config = EnvironmentConfig(alphabet="ACG", length=4, variable_length=variable_length, min_length=2, noise=1.0)
    environment, rng = SequenceEnvironment(config), np.random.default_rng(3)
    for step in range(4):
        actions = rng.choice(np.flatnonzero(environment.space.allowed[step]), 1000)
        uniforms = rng.random(1000, dtype=np.float32)
        np.testing.assert_array_equal(environment.intact.realise(step, actions, uniforms), actions)
        assert (environment.noise.realise(step, actions, uniforms) != actions).mean() > 0.5


def test_an_environment_takes_another_noise_process():
    class LastLetterAtOddSteps:
        def kernel(self, allowed: np.ndarray) -> np.ndarray:
            kernel = np.broadcast_to(np.eye(allowed.shape[1]), (len(allowed), *2 * allowed.shape[1:])).copy()
            kernel[1::2] = np.eye(allowed.shape[1])[-1]
            return kernel

    environment = SequenceEnvironment(EnvironmentConfig(length=4, noise=0.9), LastLetterAtOddSteps())
    actions, uniforms = np.array([0, 1, 2, 3]), np.array([0.0, 0.3, 0.6, 0.999])
    np.testing.assert_array_equal(environment.noise.realise(0, actions, uniforms), actions)
    np.testing.assert_array_equal(environment.noise.realise(1, actions, uniforms), [3, 3, 3, 3])
    np.testing.assert_array_equal(environment.intact.realise(1, actions, uniforms), actions)
