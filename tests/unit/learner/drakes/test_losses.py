"""Diversity and adversarial terms: against loops, closed forms and slopes."""

import math

import pytest
import torch
from torch import Tensor

from learner.drakes.losses import (
    adversarial_loss,
    discriminator_loss,
    diversity_loss,
    gradient_penalty,
    soft_hamming,
)

FORMS = ["non_saturating", "saturating", "logit"]


def one_hots(batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, (batch, length), generator=generator)
    return torch.nn.functional.one_hot(tokens, 4).double()


def relaxed(batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 4, generator=generator, dtype=torch.float64).softmax(-1)


def looped_hamming(x: Tensor) -> float:
    batch, length = x.shape[:2]
    pairs = [(n, m) for n in range(batch) for m in range(batch) if n != m]
    total = sum(1 - float(x[n, i] @ x[m, i]) for n, m in pairs for i in range(length))
    return total / (length * len(pairs))


@pytest.mark.parametrize("make", [one_hots, relaxed])
@pytest.mark.parametrize(("batch", "length"), [(2, 1), (5, 8), (16, 7)])
def test_soft_hamming_equals_the_loop_over_pairs(make, batch, length):
    x = make(batch, length, seed=batch)
    assert float(soft_hamming(x)) == pytest.approx(looped_hamming(x), abs=1e-12)
    assert float(diversity_loss(x)) == pytest.approx(-looped_hamming(x), abs=1e-12)


def test_diversity_has_the_right_gradient():
    assert torch.autograd.gradcheck(diversity_loss, relaxed(4, 3, seed=0).requires_grad_())


def test_diversity_of_extremes():
    assert float(soft_hamming(one_hots(1, 9, seed=1).repeat(6, 1, 1))) == pytest.approx(0)
    homopolymers = torch.eye(4)[:, None].repeat(1, 10, 1)
    assert float(soft_hamming(homopolymers)) == pytest.approx(1)
    many = homopolymers.repeat(500, 1, 1)
    assert float(soft_hamming(many)) == pytest.approx(0.75, abs=1e-3)
    assert float(soft_hamming(one_hots(4000, 10, seed=2))) == pytest.approx(0.75, abs=5e-3)
    with pytest.raises(ValueError, match="at least 2 sequences, got 1"):
        soft_hamming(one_hots(1, 4, seed=0))


def test_a_floor_ends_the_push():
    x = one_hots(8, 6, seed=3).requires_grad_()
    reached = soft_hamming(x).item()
    (gradient,) = torch.autograd.grad(diversity_loss(x, target=reached - 0.01), x)
    assert not gradient.any()
    loss = diversity_loss(x, target=reached + 0.25)
    assert loss.item() == pytest.approx(0.25)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.any()


def slopes(form, logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(adversarial_loss(logits, form), logits)
    return gradient * len(logits)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_falls_with_the_logit_and_stays_finite(form):
    logits = torch.tensor([-100.0, -3.0, 0.0, 2.0, 100.0], dtype=torch.float64)
    assert adversarial_loss(logits, form).isfinite()
    gradient = slopes(form, logits)
    assert gradient.isfinite().all()
    assert (gradient <= 0).all()
    assert (gradient[1:4] < 0).all()


def test_slopes_are_those_of_the_definitions():
    logits = torch.linspace(-5, 5, 11, dtype=torch.float64)
    torch.testing.assert_close(slopes("non_saturating", logits), -torch.sigmoid(-logits))
    torch.testing.assert_close(slopes("saturating", logits), -torch.sigmoid(logits))
    torch.testing.assert_close(slopes("logit", logits), -torch.ones_like(logits))
    sure = torch.tensor([-100.0], dtype=torch.float64)
    assert float(slopes("saturating", sure)) == pytest.approx(0, abs=1e-40)
    assert float(slopes("non_saturating", sure)) == pytest.approx(-1)


def test_values_are_those_of_the_definitions():
    d = torch.tensor([-1.5, 0.25, 2.0], dtype=torch.float64)
    share = torch.sigmoid(d)
    assert float(adversarial_loss(d)) == pytest.approx(float(-share.log().mean()))
    assert float(adversarial_loss(d, "saturating")) == pytest.approx(float((1 - share).log().mean()))
    assert float(adversarial_loss(d, "logit")) == pytest.approx(float(-d.mean()))
    fake, label = torch.tensor([0.5, -2.0], dtype=torch.float64), 0.9
    expected = -(label * share.log() + (1 - label) * (1 - share).log()).mean() - (1 - torch.sigmoid(fake)).log().mean()
    assert float(discriminator_loss(d, fake, real_label=label)) == pytest.approx(float(expected))


def test_smoothing_bounds_the_best_logit():
    d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([d], max_iter=100)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = discriminator_loss(d, torch.full((1,), -50.0), real_label=0.9)
        value.backward()
        return value

    optimiser.step(loss)
    assert d.item() == pytest.approx(math.log(9), abs=1e-4)


def test_the_penalty_is_half_the_squared_slope():
    x = relaxed(5, 3, seed=4).requires_grad_()
    weight = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    penalty = gradient_penalty((x * weight).sum((1, 2)), x)
    assert float(penalty) == pytest.approx(float(weight.square().sum()) / 2)
    quadratic = gradient_penalty((x.square() * weight).sum((1, 2)), x)
    (gradient,) = torch.autograd.grad(quadratic, x)
    torch.testing.assert_close(gradient, 4 * x.detach() * weight.square() / 5)
