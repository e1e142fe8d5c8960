"""The discriminator: separates two laws, gives up on equal ones, keeps gradients apart, goes on from a checkpoint."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from learner.checkpoint import load_checkpoint, save_checkpoint
from learner.drakes.discriminator import Discriminator, DiscriminatorConfig
from learner.drakes.losses import adversarial_loss


def make(length: int = 8, *, seed: int = 0, **settings: Any) -> Discriminator:
    return Discriminator(DiscriminatorConfig(network={"hidden_size": 16}, **settings), length, seed=seed)


def draws(count: int, length: int, generator: torch.Generator, *, at_rich: bool = False) -> Tensor:
    law = torch.tensor([0.4, 0.1, 0.1, 0.4] if at_rich else [0.25] * 4)
    return one_hot(torch.multinomial(law, count * length, True, generator=generator).view(count, length), 4).float()


@pytest.mark.parametrize("length", [8, 24])
def test_it_separates_two_laws(length):
    generator, discriminator = torch.Generator().manual_seed(1), make(length)
    for _ in range(120):
        metrics = discriminator.step(draws(64, length, generator, at_rich=True), draws(64, length, generator))
    with torch.no_grad():
        fresh = [discriminator(draws(1000, length, generator, at_rich=real)) for real in (True, False)]
    assert fresh[0].mean() > fresh[1].mean() + 1
    ranked = (fresh[0][:, None] > fresh[1]).float().mean()
    assert ranked > 0.8
    assert metrics["discriminator_accuracy"] > 0.6
    x = draws(10, length, generator).requires_grad_()
    (gradient,) = torch.autograd.grad(adversarial_loss(discriminator(x)), x)
    assert gradient[..., [0, 3]].mean() < gradient[..., [1, 2]].mean()  # towards the real law's letters


def test_equal_laws_leave_it_undecided():
    generator, discriminator = torch.Generator().manual_seed(2), make(real_label=1.0)
    for _ in range(150):
        discriminator.step(draws(128, 8, generator), draws(128, 8, generator))
    assert discriminator(draws(500, 8, generator)).abs().mean() < 0.3


def test_the_generator_gets_no_gradient_from_its_step():
    generator, discriminator = torch.Generator().manual_seed(3), make()
    real, fake = (draws(16, 8, generator).requires_grad_() for _ in range(2))
    discriminator.step(real, fake)
    assert real.grad is None
    assert fake.grad is None


def test_the_penalty_flattens_it():
    spread = {}
    for strength in (0.0, 30.0):
        generator, discriminator = torch.Generator().manual_seed(4), make(gradient_penalty=strength)
        for _ in range(80):
            metrics = discriminator.step(draws(64, 8, generator, at_rich=True), draws(64, 8, generator))
        spread[strength] = discriminator(draws(200, 8, generator)).std().item()
        assert (metrics["discriminator_penalty"] > 0) == (strength > 0)
    assert spread[30.0] < 0.5 * spread[0.0]


def test_real_sequences_are_shown_from_both_strands():
    """Poly-A on one strand: only with the symmetry does it learn that poly-T is real too."""
    on_poly_t = {}
    for symmetric in (True, False):
        generator, discriminator = torch.Generator().manual_seed(5), make(rc_symmetric=symmetric)
        real = one_hot(torch.zeros(32, 8, dtype=torch.int64), 4).float()
        for _ in range(60):
            discriminator.step(real, draws(64, 8, generator))
        on_poly_t[symmetric] = discriminator(real.flip(-1)[:1]).item()
    assert on_poly_t[False] < -0.3 < 0.2 < on_poly_t[True]


def test_it_goes_on_from_a_checkpoint(tmp_path):
    generator, discriminator = torch.Generator().manual_seed(6), make()
    batches = [(draws(32, 8, generator, at_rich=True), draws(32, 8, generator)) for _ in range(8)]
    for batch in batches[:5]:
        discriminator.step(*batch)
    save_checkpoint(tmp_path / "c", discriminator.training_state())
    other = make(seed=7)
    other.load_training_state(load_checkpoint(tmp_path / "c"))
    assert [other.step(*b) for b in batches[5:]] == [discriminator.step(*b) for b in batches[5:]]
