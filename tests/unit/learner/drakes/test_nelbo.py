"""NELBO estimators against the exact sum, pretraining, and going on after a save."""

import math

import pytest
import torch

from learner.drakes import exact
from learner.drakes.denoiser import Denoiser, DenoiserConfig
from learner.drakes.diffusion import ESTIMATORS, exact_nelbo, nelbo, nelbo_time
from learner.drakes.pretraining import Pretrainer, PretrainingConfig
from learner.drakes.reverse_complement import reverse_complement_tokens
from learner.drakes.schedule import SCHEDULES
from tests.reference_drakes import toy_denoiser

DRAWS = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return toy_denoiser(4)


@pytest.mark.parametrize("name", [*ESTIMATORS, "cosine"])
@torch.no_grad()
def test_estimators_are_unbiased(model, name):
    """False alarm: 8 x 6e-5 a case (4 standard errors of each of 8 sequences).

    The batch lists each sequence's draws together, so that strata in row order would show as a bias.
    """
    tokens = torch.randint(4, (8, 4), generator=seeded(1))
    rows = tokens.repeat_interleave(DRAWS, 0)
    if name == "cosine":
        draws = nelbo_time(model, rows, seeded(2), schedule=SCHEDULES["cosine"], t_min=1e-4)
    else:
        draws = ESTIMATORS[name](model, rows, seeded(2))
    draws = draws.double().view(8, DRAWS)
    error = draws.std(1) / math.sqrt(DRAWS)
    bias = 8e-3 if name in ("time", "cosine") else 0
    assert ((draws.mean(1) - exact_nelbo(model, tokens)).abs() < 4 * error + bias).all()


@torch.no_grad()
def test_counting_scatters_least(model):
    tokens = torch.randint(4, (5000, 4), generator=seeded(1))
    spread = {name: float(nelbo(model, tokens, seeded(3), estimator=name).std()) for name in ESTIMATORS}
    assert spread["count"] < spread["harmonic"] < spread["time"]


def small_pretrainer(**changes) -> Pretrainer:
    torch.manual_seed(0)
    config = {"batch_size": 64, "num_steps": 300, "learning_rate": 1e-2, "warmup_steps": 10, "average_decay": 0.95}
    return Pretrainer(
        Denoiser(4, 3, DenoiserConfig(hidden_size=16, num_layers=1)), PretrainingConfig(**config | changes)
    )


DATA = torch.tensor([[0, 1, 2], [0, 1, 3], [2, 2, 2], [3, 0, 1]])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pretraining_learns_the_data(estimator):
    trainer = small_pretrainer(estimator=estimator)
    first = trainer.step(trainer.draw(DATA))
    assert first["nelbo"] == pytest.approx(trainer.uniform_nelbo(), rel=0.5)
    assert first["nelbo_per_token"] == pytest.approx(first["nelbo"] / 3)
    for _ in range(299):
        last = trainer.step(trainer.draw(DATA))
    assert last["learning_rate"] < 1e-5
    with torch.no_grad():
        law = exact.any_order_law(exact.log_prob_table(trainer.averaged_denoiser()))
    likelihood = -law[DATA @ exact.strides(4, 3)].log().mean()
    assert math.log(4) <= float(likelihood) < math.log(4) + 0.1


def test_augmentation_teaches_the_other_strand():
    trainer = small_pretrainer(reverse_complement_probability=0.5, num_steps=400)
    for _ in range(400):
        trainer.step(trainer.draw(DATA))
    with torch.no_grad():
        law = exact.any_order_law(exact.log_prob_table(trainer.averaged_denoiser()))
    both = torch.cat([DATA, reverse_complement_tokens(DATA)]).unique(dim=0)
    assert len(both) == 8
    assert float(law[both @ exact.strides(4, 3)].min()) > 1 / 16


def test_augmentation_needs_dna():
    config = PretrainingConfig(reverse_complement_probability=0.5)
    with pytest.raises(ValueError, match="20 tokens"):
        Pretrainer(Denoiser(20, 3, DenoiserConfig(hidden_size=8)), config)


def test_a_resumed_pretraining_repeats_the_next_steps_exactly():
    trainer = small_pretrainer(reverse_complement_probability=0.5)
    for _ in range(5):
        trainer.step(trainer.draw(DATA))
    state = trainer.state_dict()
    expected = [trainer.step(trainer.draw(DATA)) for _ in range(3)]
    other = small_pretrainer(reverse_complement_probability=0.5)
    other.step(other.draw(DATA))
    other.load_state_dict(state)
    assert [other.step(other.draw(DATA)) for _ in range(3)] == expected
    assert torch.equal(other.averaged, trainer.averaged)
    again = small_pretrainer(reverse_complement_probability=0.5)
    again.load_state_dict(state)  # unharmed by the steps since
    assert again.step(again.draw(DATA)) == expected[0]


def test_averaged_weights_lag_and_are_apart():
    trainer = small_pretrainer(average_decay=0.9)
    trajectory = [trainer.weights.vector.detach().clone()]
    expected = trajectory[0].clone()
    for number in range(1, 31):
        trainer.step(trainer.draw(DATA))
        trajectory.append(trainer.weights.vector.detach().clone())
        decay = min(0.9, number / (number + 9))
        expected = decay * expected + (1 - decay) * trajectory[-1]
    torch.testing.assert_close(trainer.averaged, expected)
    averaged = trainer.averaged_denoiser()
    trainer.step(trainer.draw(DATA))
    vector = torch.cat([p.detach().flatten() for p in averaged.parameters()])
    torch.testing.assert_close(vector, expected)
