"""The exact laws against loops over orders and outcomes, and what must hold of them."""

import math

import numpy as np
import pytest
import torch

from learner.drakes import exact
from learner.drakes.denoiser import SymmetricDenoiser, encode
from learner.drakes.diffusion import exact_nelbo
from learner.drakes.schedule import SCHEDULES
from tests import reference_drakes as reference
from tests.reference_drakes import RandomTable, conditional_of, toy_denoiser

SIZES = [(4, 3), (2, 4), (3, 3)]


def pair(num_tokens: int, length: int) -> tuple[RandomTable, RandomTable]:
    return RandomTable(num_tokens, length, 0), RandomTable(num_tokens, length, 1)


@torch.no_grad()
def table_of(model, **options) -> torch.Tensor:
    return exact.log_prob_table(model, **options)


@pytest.mark.parametrize(("num_tokens", "length"), SIZES)
def test_the_any_order_law_averages_over_orders(num_tokens, length):
    model = RandomTable(num_tokens, length)
    law = exact.any_order_law(table_of(model))
    expected = reference.any_order_law(conditional_of(model), num_tokens, length)
    for row, x in enumerate(reference.sequences(num_tokens, length)):
        assert float(law[row]) == pytest.approx(expected[x], rel=1e-9)


@pytest.mark.parametrize("model", [RandomTable(4, 4), toy_denoiser(4), toy_denoiser(4, masked_fraction=True)])
def test_every_level_sums_to_one(model):
    reach = exact.reach(table_of(model))
    num_masked = (exact.all_strings(5, 4) == 4).sum(1)
    for level in range(5):
        assert float(reach[num_masked == level].sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_the_law_of_eight_mers_sums_to_one():
    model = toy_denoiser(8)
    table = table_of(model)
    law = exact.any_order_law(table)
    assert len(law) == 4**8
    assert float(law.sum()) == pytest.approx(1, abs=1e-6)
    nelbo = exact.nelbo_of_all(table)
    assert float((nelbo + law.log()).min()) > -1e-6
    rows = [0, 77, 40_000, 65_535]
    expected = exact_nelbo(model, exact.all_strings(4, 8)[rows])
    torch.testing.assert_close(nelbo[rows], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_tokens", "length"), SIZES)
@torch.no_grad()
def test_exact_nelbo(num_tokens, length):
    model = RandomTable(num_tokens, length)
    sequences = list(reference.sequences(num_tokens, length))
    of_all = exact.nelbo_of_all(table_of(model))
    direct = exact_nelbo(model, torch.tensor(sequences))
    expected = [reference.nelbo(conditional_of(model), x, num_tokens) for x in sequences]
    np.testing.assert_allclose(of_all.numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(direct.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("model", [RandomTable(4, 4), toy_denoiser(4), toy_denoiser(5, num_tokens=3)])
def test_nelbo_bounds_the_likelihood(model):
    table = table_of(model)
    gap = exact.nelbo_of_all(table) + exact.any_order_law(table).log()
    assert float(gap.min()) > -1e-6
    assert float(gap.max()) > 1e-4  # and is no equality


@pytest.mark.parametrize(("num_tokens", "length"), SIZES)
def test_path_kl(num_tokens, length):
    ours, theirs = pair(num_tokens, length)
    value = float(exact.path_kl(table_of(ours), table_of(theirs)))
    expected = reference.any_order_path_kl(conditional_of(ours), conditional_of(theirs), num_tokens, length)
    assert value == pytest.approx(expected, rel=1e-9)
    assert float(exact.path_kl(table_of(ours), table_of(ours))) == 0
    p, q = exact.any_order_law(table_of(ours)), exact.any_order_law(table_of(theirs))
    assert value > float((p * (p / q).log()).sum()) > 0


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize(("num_tokens", "length"), [(4, 2), (2, 3)])
def test_finite_steps(num_tokens, length, num_steps):
    ours, theirs = pair(num_tokens, length)
    law, path_kl = exact.finite_step_law(table_of(ours), table_of(theirs), num_steps)
    p, q = conditional_of(ours), conditional_of(theirs)
    expected = reference.finite_step_law(p, num_tokens, length, [1 / k for k in range(num_steps, 0, -1)])
    for row, x in enumerate(reference.sequences(num_tokens, length)):
        assert float(law[row]) == pytest.approx(expected[x], rel=1e-9)
    kl = reference.finite_step_path_kl(p, q, num_tokens, length, num_steps)
    assert float(path_kl) == pytest.approx(kl, rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_many_steps_come_near_any_order(name):
    ours, theirs = pair(4, 3)
    tables = table_of(ours), table_of(theirs)
    limit, limit_kl = exact.any_order_law(tables[0]), exact.path_kl(*tables)
    errors = []
    for num_steps in (4, 32, 256):
        law, path_kl = exact.finite_step_law(*tables, num_steps, SCHEDULES[name])
        assert float(law.sum()) == pytest.approx(1, abs=1e-9)
        errors.append((float((law - limit).abs().sum()), abs(float(path_kl - limit_kl))))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2][0] < 0.01
    assert errors[2][1] < 0.02


def test_symmetric_tables():
    model = toy_denoiser(3)
    table, direct = table_of(model, symmetric=True), table_of(SymmetricDenoiser(model))
    masked = exact.all_strings(5, 3) == 4
    torch.testing.assert_close(table[masked], direct[masked])
    law = exact.any_order_law(table)
    other = exact.all_strings(4, 3).flip(1).neg().add(3) @ exact.strides(4, 3)
    torch.testing.assert_close(law, law[other], atol=1e-7, rtol=0)


def test_tables_in_chunks(monkeypatch):
    model = toy_denoiser(3)
    whole = table_of(model)
    monkeypatch.setattr(exact, "CHUNK", 7)
    torch.testing.assert_close(table_of(model), whole)
    state = torch.tensor([1, 4, 0])
    with torch.no_grad():
        expected = model.log_probs(encode(state[None], 4))[0]
    torch.testing.assert_close(whole[1 * 25 + 4 * 5 + 0], expected)


def test_optimum_and_gap():
    """J* - J(θ) = alpha KL of the two laws of paths; here θ reveals in one step, so that paths are sequences."""
    rng = np.random.default_rng(0)
    pre, law, rewards, alpha = rng.dirichlet(np.ones(30)), rng.dirichlet(np.ones(30)), rng.normal(size=30), 0.3
    best, value = exact.optimum(pre, rewards, alpha)
    assert value == pytest.approx(alpha * math.log(float((pre * np.exp(rewards / alpha)).sum())), rel=1e-12)

    def objective(p: np.ndarray) -> float:
        return float(p @ rewards - alpha * (p * np.log(p / pre)).sum())

    assert objective(best) == pytest.approx(value, rel=1e-12)
    assert value - objective(law) == pytest.approx(alpha * float((law * np.log(law / best)).sum()), rel=1e-9)
    assert exact.optimum(pre, rewards * 1e6, alpha)[1] == pytest.approx(1e6 * rewards.max(), rel=1e-4)
    with pytest.raises(ValueError, match="alpha 0"):
        exact.optimum(pre, rewards, 0)


def test_frontier():
    rng = np.random.default_rng(1)
    pre, rewards = rng.dirichlet(np.ones(40)), rng.normal(size=40)
    points = exact.frontier(pre, rewards, np.array([10.0, 1.0, 0.1]))
    assert points[0].path_kl < points[1].path_kl < points[2].path_kl
    assert float(pre @ rewards) < points[0].reward < points[1].reward < points[2].reward < rewards.max()
    for point in points:
        law, _ = exact.optimum(pre, rewards, point.alpha)
        assert point.path_kl == pytest.approx(float((law * np.log(law / pre)).sum()), rel=1e-9)
        assert exact.best_reward(pre, rewards, point.path_kl) == pytest.approx(point.reward, rel=1e-6)


def test_large_spaces_are_refused():
    with pytest.raises(ValueError, match="too many to enumerate"):
        exact.all_strings(5, 20)
