"""The denoiser: what it starts as, what it reads, its attention, carry-over and both strands."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from learner.drakes.denoiser import (
    Denoiser,
    DenoiserConfig,
    SymmetricDenoiser,
    carry_over,
    encode,
    frozen_copy,
)
from learner.drakes.diffusion import exact_nelbo
from learner.drakes.reverse_complement import reverse_complement_one_hot
from learner.networks.attention import sinusoidal_positions
from tests.reference_drakes import toy_denoiser

VARIANTS = [
    {},
    {"stem_kernel": 5},
    {"stem_kernel": 3, "stem_channels": 6},
    {"masked_fraction": True},
    {"num_layers": 3, "num_heads": 2},
]


def random_states(length: int = 6, num_tokens: int = 4, count: int = 9) -> torch.Tensor:
    tokens = torch.randint(num_tokens + 1, (count, length), generator=torch.Generator().manual_seed(0))
    return encode(tokens, num_tokens)


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("num_tokens", [2, 4, 20])
def test_it_starts_uniform(changes, num_tokens):
    model = Denoiser(num_tokens, 3, DenoiserConfig(hidden_size=8, **changes))
    tokens = torch.randint(num_tokens, (5, 3))
    assert exact_nelbo(model, tokens).tolist() == pytest.approx([3 * math.log(num_tokens)] * 5, abs=1e-5)


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_position_and_channel_is_read(changes):
    model = toy_denoiser(6, **changes)
    states = random_states().requires_grad_()
    model.log_probs(states)[:, 2, 1].sum().backward()
    assert states.grad is not None
    assert (states.grad.abs().amax(0) > 0).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("stem_channels", [0, 5])
def test_every_parameter_is_trained(stem_channels):
    model = toy_denoiser(6, stem_kernel=3, stem_channels=stem_channels, masked_fraction=True)
    model.log_probs(random_states())[..., 0].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_sinusoidal_positions_as_written():
    table = sinusoidal_positions(7, 6)
    for position in range(7):
        for j in range(3):
            angle = position / 10000 ** (2 * j / 6)
            assert float(table[position, 2 * j]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[position, 2 * j + 1]) == pytest.approx(math.cos(angle), abs=1e-6)
    with pytest.raises(ValueError, match="hidden_size 5"):
        sinusoidal_positions(7, 5)


def test_attention_maps_are_those_of_the_fused_path():
    model = toy_denoiser(6, num_layers=2)
    states = random_states()
    weights = model.attention(states)
    assert weights.shape == (2, 9, 4, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9, 4, 6))
    assert (weights > 0).all()  # bidirectional
    block, x = model.blocks[0], model.embedding(states) + model.positions
    qkv = block.qkv(block.attention_norm(x)).view(9, 6, 3, 4, 4)
    values = torch.einsum("bhij,bjhd->bihd", weights[0], qkv[:, :, 2]).flatten(2)
    y = x + block.project(values)
    torch.testing.assert_close(block(x), y + block.feed_forward(block.feed_forward_norm(y)))


def test_carry_over_is_a_point_mass_at_visible_tokens():
    model, states = toy_denoiser(6), random_states()
    log_probs = model.log_probs(states)
    carried = carry_over(log_probs, states)
    masked = states[..., -1] > 0
    assert torch.equal(carried[masked], log_probs[masked])
    assert torch.equal(carried[~masked].exp(), states[~masked][:, :-1])


@pytest.mark.parametrize("changes", VARIANTS)
def test_both_strands_agree(changes):
    model = toy_denoiser(6, **changes)
    symmetric, states = SymmetricDenoiser(model), random_states()
    ours = symmetric.log_probs(states).exp()
    torch.testing.assert_close(ours.sum(-1), torch.ones(9, 6), atol=1e-6, rtol=0)
    other = symmetric.log_probs(reverse_complement_one_hot(states)).exp()
    torch.testing.assert_close(reverse_complement_one_hot(other), ours, atol=1e-6, rtol=0)
    plain = model.log_probs(states).exp()
    mirrored = model.log_probs(reverse_complement_one_hot(states)).exp()
    for i, v in np.ndindex(6, 4):
        torch.testing.assert_close(ours[:, i, v], (plain[:, i, v] + mirrored[:, 5 - i, 3 - v]) / 2)
    assert not torch.allclose(plain, ours, atol=1e-3)


def test_only_dna_has_two_strands():
    with pytest.raises(ValueError, match="20 tokens"):
        SymmetricDenoiser(toy_denoiser(6, num_tokens=20))


def test_half_precision_states_give_float32_log_probs():
    model = toy_denoiser(6).bfloat16()
    assert model.log_probs(random_states().bfloat16()).dtype == torch.float32


def test_a_frozen_copy_passes_gradients_to_its_input_only():
    model, states = toy_denoiser(6), random_states().requires_grad_()
    copy = frozen_copy(model)
    assert torch.equal(copy.log_probs(states), model.log_probs(states))
    copy.log_probs(states)[..., 0].sum().backward()
    assert states.grad is not None
    assert all(p.grad is None for p in [*copy.parameters(), *model.parameters()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 7}, "hidden_size"),
        ({"hidden_size": 10, "num_heads": 4}, "multiple of num_heads 4"),
        ({"stem_kernel": 4}, "stem_kernel 4 must be odd"),
        ({"stem_channels": 8}, "stem_channels 8 needs a stem"),
        ({"depth": 2}, "depth"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    with pytest.raises(ValidationError, match=message):
        DenoiserConfig(**changes)
