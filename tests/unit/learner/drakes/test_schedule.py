"""Masking schedules, the other strand, and forward noise."""

import math

import pytest
import torch

from learner.drakes.diffusion import mask_at, posterior
from learner.drakes.reverse_complement import reverse_complement_one_hot, reverse_complement_tokens
from learner.drakes.schedule import LOG_LINEAR, SCHEDULES, grid

TIMES = torch.linspace(0.01, 1, 37, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_rises_from_none_to_all(name):
    schedule = SCHEDULES[name]
    ends = schedule.mask_prob(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0, 1], abs=1e-15)
    assert (schedule.mask_prob(TIMES).diff() > 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_weight_is_the_slope_of_log_m(name):
    times = TIMES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(SCHEDULES[name].mask_prob(times).log().sum(), times)
    torch.testing.assert_close(SCHEDULES[name].weight(TIMES), slope, rtol=1e-10, atol=1e-12)


def test_closed_forms():
    cosine = SCHEDULES["cosine"]
    for t in (0.1, 0.5, 0.9):
        time = torch.tensor(t, dtype=torch.float64)
        assert float(LOG_LINEAR.mask_prob(time)) == t
        assert float(cosine.mask_prob(time)) == pytest.approx(1 - math.cos(math.pi * t / 2), rel=1e-12)
        weight = math.pi / 2 * math.sin(math.pi * t / 2) / (1 - math.cos(math.pi * t / 2))
        assert float(cosine.weight(time)) == pytest.approx(weight, rel=1e-12)
    assert LOG_LINEAR.unmask_probs(5).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_reveal_everything(name, num_steps):
    schedule = SCHEDULES[name]
    unmask, reveal = schedule.unmask_probs(num_steps), schedule.reveal_probs(num_steps)
    assert float(unmask[0]) == pytest.approx(1, abs=1e-15)
    assert float(reveal.sum()) == pytest.approx(1, abs=1e-12)
    survival = 1.0
    for k in range(num_steps, 0, -1):
        assert float(reveal[k - 1]) == pytest.approx(survival * float(unmask[k - 1]), abs=1e-12)
        survival *= 1 - float(unmask[k - 1])


def test_a_grid_needs_a_step():
    with pytest.raises(ValueError, match="num_steps 0"):
        grid(0)


def test_the_other_strand():
    assert reverse_complement_tokens(torch.tensor([0, 1, 4, 3, 3])).tolist() == [0, 0, 4, 2, 3]
    tokens = torch.randint(5, (20, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(reverse_complement_tokens(reverse_complement_tokens(tokens)), tokens)
    one_hot = torch.nn.functional.one_hot(tokens, 5).float()
    expected = torch.nn.functional.one_hot(reverse_complement_tokens(tokens), 5).float()
    assert torch.equal(reverse_complement_one_hot(one_hot), expected)
    bases = torch.rand(3, 6, 4)
    assert torch.equal(reverse_complement_one_hot(reverse_complement_one_hot(bases)), bases)
    assert torch.equal(reverse_complement_one_hot(bases)[:, 1, 0], bases[:, 4, 3])
    with pytest.raises(ValueError, match="needs 4 letters"):
        reverse_complement_one_hot(torch.zeros(2, 3, 20))


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_masks_the_stated_share(name):
    """False alarm: 6e-5 a case (4 standard errors)."""
    times = torch.full((2000,), 0.4)
    tokens = torch.randint(4, (2000, 10), generator=torch.Generator().manual_seed(1))
    noisy = mask_at(tokens, times, 4, SCHEDULES[name], torch.Generator().manual_seed(2))
    assert torch.equal(noisy[noisy != 4], tokens[noisy != 4])
    share = float(SCHEDULES[name].mask_prob(torch.tensor(0.4)))
    error = math.sqrt(share * (1 - share) / noisy.numel())
    assert abs(float((noisy == 4).float().mean()) - share) < 4 * error


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_posterior_follows_from_bayes(name):
    """q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0), one position at a time."""
    schedule = SCHEDULES[name]
    t, s = torch.tensor([0.7]), torch.tensor([0.3])
    m_t, m_s = float(schedule.mask_prob(t)), float(schedule.mask_prob(s))
    kept = (1 - m_t) / (1 - m_s)  # a token that is visible at s is still so at t
    law = posterior(torch.tensor([[4, 2]]), torch.tensor([[1, 2]]), t, s, 4, schedule)[0]
    assert float(law[0, 1]) == pytest.approx((1 - m_s) * (1 - kept) / m_t, abs=1e-6)
    assert float(law[0, 4]) == pytest.approx(m_s / m_t, abs=1e-6)
    assert law.sum(-1).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert law[1].tolist() == [0, 0, 1, 0, 0]
