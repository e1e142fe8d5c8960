"""What no policy can avoid under noise: the closest attainable law, by water-filling, by EM, and on SIX6."""

import numpy as np
import pytest

from actors.environments.noise import UniformSubstitution
from actors.oracles.tfbind8 import e_score_table
from learner import exact
from learner.space import SequenceSpace
from tests.reference import assert_water_filling, em_projection, fixed_space, random_rows, variable_space

SIX6 = fixed_space(4, 8)
SIX6_FLOORS = {0.1: (0.00016, 0.0004, 0.042), 0.25: (0.0020, 0.0053, 0.104)}
"""α -> KL floor in nats, TV of the closest attainable law, TV of a policy that follows the target and ignores noise."""


@pytest.fixture(scope="module")
def six6_target() -> exact.TargetTree:
    scores = e_score_table("SIX6_REF_R1").astype(np.float64)
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    return exact.target_tree(SIX6, 3 * np.log(np.maximum(scores, 1e-3)))


def noise(space: SequenceSpace, alpha: float) -> np.ndarray:
    return UniformSubstitution(alpha).kernel(space.allowed)


def kl_rows(p: np.ndarray, m: np.ndarray) -> np.ndarray:
    ratio = np.divide(p, m, out=np.ones_like(p), where=p > 0)
    return (p * np.log(ratio)).sum(1)


def floors(space: SequenceSpace, target: exact.TargetTree, kernel: np.ndarray) -> tuple[float, float]:
    return exact.kl_floor(space, target, exact.replacement_floor(kernel))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("space", [fixed_space(4, 1), variable_space(3, 2, 1)], ids=str)
def test_projection_equals_maximum_likelihood_weights(space: SequenceSpace, alpha: float):
    rng, kernel = np.random.default_rng(0), noise(space, alpha)
    floor = exact.replacement_floor(kernel)
    for t in range(space.max_length):
        p = random_rows(rng, space.allowed[t], 30) ** 3  # peaked, so that some tokens are pinned
        p[0] = np.eye(space.num_actions)[0]
        p /= p.sum(1, keepdims=True)
        projected, by_em = exact.attainable_projection(p, floor[t]), em_projection(p, kernel[t], 3000)
        np.testing.assert_allclose(kl_rows(p, projected), kl_rows(p, by_em), atol=1e-5)
        np.testing.assert_allclose(projected, by_em, atol=3e-3)
        for target, closest in zip(p, projected, strict=True):
            assert_water_filling(target, closest, floor[t])


def test_attainable_rows_are_their_own_projection():
    rng, floor = np.random.default_rng(1), np.asarray([0.1, 0.05, 0.0, 0.2])
    rows = floor + (1 - floor.sum()) * random_rows(rng, np.ones(4, bool), 20)
    np.testing.assert_allclose(exact.attainable_projection(rows, floor), rows, atol=1e-12)


def test_pure_noise_leaves_one_law():
    floor = np.asarray([0.5, 0.25, 0.25])
    rows = random_rows(np.random.default_rng(2), np.ones(3, bool), 5)
    np.testing.assert_allclose(exact.attainable_projection(rows, floor), np.tile(floor, (5, 1)), atol=1e-12)


@pytest.mark.parametrize("space", [fixed_space(3, 3), variable_space(2, 4, 0), variable_space(2, 4, 2)], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_floor_is_reached_by_the_em_policy(space: SequenceSpace, alpha: float):
    """Realised laws of the EM-fitted conditionals: their divergence is the floor."""
    kernel = noise(space, alpha)
    target = exact.target_tree(space, 3 * np.random.default_rng(3).normal(size=space.num_sequences))
    closest = [em_projection(target.conditionals[t], kernel[t], 1500) for t in range(space.max_length)]
    law, _ = exact.realised_law(space, closest, np.tile(np.eye(space.num_actions), (space.max_length, 1, 1)))
    kl, tv = floors(space, target, kernel)
    assert kl == pytest.approx(exact.kl_divergence(target.law, law), abs=1e-4)
    assert tv == pytest.approx(exact.total_variation(target.law, law), abs=1e-3)
    assert (kl > 0.01) == (alpha > 0)


def test_floor_of_a_target_with_impossible_sequences():
    """Noise reaches prefixes that the target never does; what is realised below them is lost to the target."""
    space, alpha = fixed_space(2, 2), 0.5
    target = exact.target_tree(space, np.asarray([0.0, 0.0, -np.inf, -np.inf]))
    kl, tv = floors(space, target, noise(space, alpha))
    assert kl == pytest.approx(-np.log(1 - alpha / 2))  # the first token fails with probability alpha / 2
    assert tv == pytest.approx(alpha / 2)


def test_replacement_floor_reads_the_kernel():
    space = variable_space(3, 3, 1)
    floor = exact.replacement_floor(noise(space, 0.3))
    np.testing.assert_allclose(floor[0], [0.1, 0.1, 0.1, 0.0], atol=1e-12)
    np.testing.assert_allclose(floor[1:], 0.3 / 4, atol=1e-12)


def test_noise_of_another_form_has_no_known_floor():
    kernel = np.asarray([[[0.8, 0.2, 0.0], [0.0, 0.8, 0.2], [0.2, 0.0, 0.8]]])
    with pytest.raises(ValueError, match="replaces the intended token"):
        exact.replacement_floor(kernel)


@pytest.mark.parametrize("alpha", SIX6_FLOORS)
def test_six6_floor(six6_target: exact.TargetTree, alpha: float):
    kl, tv = floors(SIX6, six6_target, noise(SIX6, alpha))
    assert kl == pytest.approx(SIX6_FLOORS[alpha][0], abs=5e-5)
    assert tv == pytest.approx(SIX6_FLOORS[alpha][1], abs=5e-5)


@pytest.mark.parametrize("alpha", SIX6_FLOORS)
def test_six6_floor_by_em(six6_target: exact.TargetTree, alpha: float):
    kernel = noise(SIX6, alpha)
    total = 0.0
    for t in range(SIX6.max_length):
        p = six6_target.conditionals[t]
        total += float(six6_target.reach[t] @ kl_rows(p, em_projection(p, kernel[t], 100)))
    kl, _ = floors(SIX6, six6_target, kernel)
    assert kl == pytest.approx(total, abs=2e-5)
    assert kl <= total + 1e-12  # EM approaches it from above


@pytest.mark.parametrize("alpha", SIX6_FLOORS)
def test_six6_ignoring_noise_is_far_from_the_target(six6_target: exact.TargetTree, alpha: float):
    law, _ = exact.realised_law(SIX6, six6_target.conditionals, noise(SIX6, alpha))
    ignorant = exact.total_variation(six6_target.law, law)
    assert ignorant == pytest.approx(SIX6_FLOORS[alpha][2], abs=5e-4)
    assert ignorant > 10 * floors(SIX6, six6_target, noise(SIX6, alpha))[1]
