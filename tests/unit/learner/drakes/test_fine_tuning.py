"""Rollouts for fine-tuning: their law, path KL, gradients, truncation, and the way to a known optimum."""

import functools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from learner.drakes import exact
from learner.drakes.denoiser import Denoiser, encode, frozen_copy
from learner.drakes.fine_tuning import Rollout, RolloutConfig, reinforce_loss, rollout, step_kl
from learner.drakes.schedule import SCHEDULES
from tests.reference_drakes import chi_square, histogram, toy_denoiser

LENGTH, STEPS = 4, 16
ESTIMATORS = ["straight_through", "relaxed", "reinforce"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def models() -> tuple[Denoiser, Denoiser]:
    return toy_denoiser(LENGTH, seed=0), frozen_copy(toy_denoiser(LENGTH, seed=1))


@functools.cache
def tables() -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        ours, theirs = (exact.log_prob_table(model) for model in models())
    return ours, theirs


def draw(batch: int, seed: int = 0, **changes) -> Rollout:
    return rollout(*models(), batch, RolloutConfig(**{"num_steps": STEPS} | changes), generator=seeded(seed))


def multilinear(x: Tensor) -> Tensor:
    """A smooth reward with interactions, of one-hots [B, 4, 4]."""
    weights = torch.randn(3, LENGTH, 4, generator=seeded(42))
    features = torch.einsum("blv,klv->bkl", x, weights)
    return features[:, 0].sum(-1) + features[:, 1, 0] * features[:, 1, 1] + features[:, 2, 2] * features[:, 2, 3]


def gradient(model: torch.nn.Module, value: Tensor) -> Tensor:
    parts = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    pairs = zip(parts, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"truncation": 5}, {"estimator": "reinforce"}, {"schedule": "cosine"}], ids=str
)
@torch.no_grad()
def test_rollouts_are_ancestral_samples(changes):
    """False alarm: 3e-4 a case (chi-square, 255 degrees of freedom, above 340)."""
    law, _ = exact.finite_step_law(*tables(), 4, SCHEDULES[changes.get("schedule", "log_linear")])
    drawn = draw(
        30_000 if changes else 100_000,
        num_steps=4,
        **(changes | ({"truncation": 2} if "truncation" in changes else {})),
    )
    assert chi_square(histogram(drawn.tokens, 4), law.numpy()) < 340
    assert torch.equal(drawn.x0, encode(drawn.tokens, 4)[..., :4])  # one-hot to the last bit


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_x0_is_one_hot(estimator):
    drawn = draw(300, estimator=estimator)
    assert torch.equal(drawn.x0.detach(), encode(drawn.tokens, 4)[..., :4])
    assert drawn.x0.requires_grad == (estimator != "reinforce")
    assert torch.isfinite(drawn.path_kl).all()


@pytest.mark.parametrize("changes", [{}, {"truncation": 5}, {"schedule": "cosine"}, {"num_steps": 3}], ids=str)
@torch.no_grad()
def test_path_kl_of_rollouts(changes):
    """False alarm: 2 x 6e-5 a case (4 standard errors)."""
    num_steps = changes.get("num_steps", STEPS)
    _, expected = exact.finite_step_law(*tables(), num_steps, SCHEDULES[changes.get("schedule", "log_linear")])
    drawn = draw(20_000, seed=3, **changes)
    for values in (drawn.path_kl, drawn.log_ratio):
        assert abs(float(values.mean() - expected)) < 4 * float(values.std()) / math.sqrt(len(values))
    assert drawn.path_kl.std() < drawn.log_ratio.std()
    assert (drawn.path_kl > 0).all()


@torch.no_grad()
def test_path_kl_at_some_states_is_unbiased():
    """False alarm: 2 x 6e-5. A rollout's sequences share their rounds, so the errors are those of 400 rollouts."""
    _, expected = exact.finite_step_law(*tables(), STEPS)
    rollouts = [draw(32, seed, kl_evaluations=2) for seed in range(400)]
    for values in ([float(r.path_kl.mean()) for r in rollouts], [float(r.log_ratio.mean()) for r in rollouts]):
        means = torch.tensor(values)
        assert abs(float(means.mean() - expected)) < 4 * float(means.std()) / 20


@torch.no_grad()
def test_path_kl_exceeds_that_of_the_sequences():
    p, q = (exact.any_order_law(table) for table in tables())
    assert float(exact.path_kl(*tables())) > float((p * (p / q).log()).sum()) > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_kl_to_oneself(estimator):
    model = models()[0]
    drawn = rollout(model, frozen_copy(model), 50, RolloutConfig(num_steps=6, estimator=estimator), generator=seeded())
    assert (drawn.path_kl == 0).all()
    assert estimator == "relaxed" or (drawn.log_ratio == 0).all()


def test_log_prob_and_log_ratio_are_those_of_the_path():
    ours, theirs = models()
    drawn = draw(5)
    for row in range(5):
        expected, ratio = 0.0, 0.0
        for step in sorted(set(drawn.reveal_steps[row].tolist()), reverse=True):
            state = torch.where(drawn.reveal_steps[row] > step, drawn.tokens[row], 4)
            with torch.no_grad():
                p, q = (model.log_probs(encode(state[None], 4))[0] for model in (ours, theirs))
            for i in (drawn.reveal_steps[row] == step).nonzero().squeeze(1).tolist():
                expected += float(p[i, drawn.tokens[row, i]])
                ratio += float((p - q)[i, drawn.tokens[row, i]])
        assert float(drawn.log_prob[row]) == pytest.approx(expected, abs=1e-4)
        assert float(drawn.log_ratio[row]) == pytest.approx(ratio, abs=1e-4)


def test_step_kl_as_written():
    p, q = torch.rand(2, 3, 4).log_softmax(-1), torch.rand(2, 3, 4).log_softmax(-1)
    masked = torch.tensor([[True, False, True], [False, False, False]])
    expected = sum(float(a.exp() * (a - b)) for i in (0, 2) for a, b in zip(p[0, i], q[0, i], strict=True)) / 5
    assert step_kl(p, q, masked, 1 / 5).tolist() == pytest.approx([expected, 0], abs=1e-6)


# --- gradients --------------------------------------------------------------------------------------------------------


def mean_gradient(make, batches: int = 60) -> Tensor:
    return torch.stack([make(seed) for seed in range(batches)]).mean(0)


def compare(estimate: Tensor, truth: Tensor) -> tuple[float, float]:
    return float(torch.cosine_similarity(estimate, truth, 0)), float(estimate.norm() / truth.norm())


@functools.cache
def true_gradient() -> Tensor:
    model = models()[0]
    law, _ = exact.finite_step_law(exact.log_prob_table(model), tables()[1], STEPS)
    rewards = multilinear(encode(exact.all_strings(4, LENGTH), 4)[..., :4])
    return gradient(model, (law * rewards.double()).sum())


def test_straight_through_gradient():
    """Cosine and length against autograd through the exact law; 60 batches of 64."""

    def make(seed: int) -> Tensor:
        return gradient(models()[0], multilinear(draw(64, seed).x0).mean())

    cosine, ratio = compare(mean_gradient(make), true_gradient())
    assert cosine > 0.99
    assert 0.5 <= ratio <= 1.1


def test_reinforce_gradient():
    """The unbiased reference: 60 batches of 1,024.

    The length along the truth has a standard error of .040 with 60 batches of 64 (measured over 400), so .05 would be a
    false alarm one time in five; with these it is five standard errors.
    """

    def make(seed: int) -> Tensor:
        drawn = draw(1024, seed, estimator="reinforce")
        return -gradient(models()[0], reinforce_loss(drawn, multilinear(drawn.x0), 0.0))

    cosine, ratio = compare(mean_gradient(make), true_gradient())
    assert cosine > 0.99
    assert ratio == pytest.approx(1, abs=0.05)


def test_gradient_of_the_path_kl():
    model, table = models()[0], exact.log_prob_table(models()[0])
    truth = gradient(model, exact.finite_step_law(table, tables()[1], STEPS)[1])
    whole = mean_gradient(lambda seed: gradient(model, draw(64, seed).path_kl.mean()), 30)
    local = mean_gradient(lambda seed: gradient(model, draw(64, seed, state_gradient=False).path_kl.mean()), 30)
    assert compare(whole, truth)[0] > 0.98
    assert compare(whole, truth)[0] > compare(local, truth)[0]

    def by_reinforce(seed: int) -> Tensor:
        drawn = draw(64, seed, estimator="reinforce")
        return gradient(model, reinforce_loss(drawn, torch.zeros(64), 1.0))

    cosine, ratio = compare(mean_gradient(by_reinforce), truth)
    assert cosine > 0.98
    assert ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("estimator", ["straight_through", "relaxed"])
def test_truncation_to_nothing_leaves_no_reward_gradient(estimator):
    drawn = draw(64, truncation=0, estimator=estimator)
    assert not drawn.x0.requires_grad
    assert float(gradient(models()[0], drawn.path_kl.mean()).norm()) > 0  # the KL's own stays


@pytest.mark.parametrize("estimator", ["straight_through", "relaxed"])
def test_truncation_to_everything_is_none(estimator):
    model = models()[0]
    whole, same = draw(64, estimator=estimator), draw(64, estimator=estimator, truncation=STEPS)
    assert torch.equal(whole.tokens, same.tokens)
    assert torch.equal(gradient(model, multilinear(whole.x0).mean()), gradient(model, multilinear(same.x0).mean()))


def test_truncation_shortens_the_gradient():
    model = models()[0]
    lengths = [
        float(
            mean_gradient(lambda s, k=k: gradient(model, multilinear(draw(64, s, truncation=k).x0).mean()), 10).norm()
        )
        for k in (4, 8, 16)
    ]
    assert lengths[0] < lengths[1] < lengths[2]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("truncation", [5, None])
def test_checkpointing_changes_nothing(estimator, truncation):
    model, changes = models()[0], {"estimator": estimator, "truncation": truncation}
    plain, saved = draw(16, **changes), draw(16, checkpoint=True, **changes)
    assert torch.equal(plain.tokens, saved.tokens)
    loss = [(d.path_kl + multilinear(d.x0) + d.log_prob.nan_to_num()).mean() for d in (plain, saved)]
    torch.testing.assert_close(gradient(model, loss[0]), gradient(model, loss[1]))


def test_relaxed_gradient_points_up():
    def make(seed: int) -> Tensor:
        return gradient(models()[0], multilinear(draw(64, seed, estimator="relaxed").x0).mean())

    cosine, ratio = compare(mean_gradient(make, 30), true_gradient())
    assert cosine > 0.9
    assert 0.2 < ratio < 1


def test_impossible_settings_are_named():
    with pytest.raises(ValidationError, match="truncation 9 must not exceed num_steps 8"):
        RolloutConfig(truncation=9)
    with pytest.raises(ValueError, match="at least two"):
        reinforce_loss(draw(1, estimator="reinforce"), torch.zeros(1), 0.1)


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["straight_through", "reinforce"])
def test_fine_tuning_reaches_the_optimum(estimator):
    """J(θ)/J* >= .9 within 300 steps, all sums exact; the reward's optimum is far from the pretrained law."""
    pretrained = frozen_copy(toy_denoiser(LENGTH, seed=1, scale=0.2))
    model = toy_denoiser(LENGTH, seed=1, scale=0.2)
    config = RolloutConfig(num_steps=4, estimator=estimator)
    optimiser, alpha, generator = torch.optim.Adam(model.parameters(), lr=1e-2), 0.5, seeded(4)
    for _ in range(300):
        drawn = rollout(model, pretrained, 64, config, generator=generator)
        if estimator == "reinforce":
            loss = reinforce_loss(drawn, multilinear(drawn.x0), alpha)
        else:
            loss = (alpha * drawn.path_kl - multilinear(drawn.x0)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        ours, theirs = exact.log_prob_table(model), exact.log_prob_table(pretrained)
    rewards = multilinear(encode(exact.all_strings(4, LENGTH), 4)[..., :4]).double()
    law, before = exact.any_order_law(ours), exact.any_order_law(theirs)
    reached = float(law @ rewards) - alpha * float(exact.path_kl(ours, theirs))
    _, best = exact.optimum(before.numpy(), rewards.numpy(), alpha)
    assert float(before @ rewards) < 0.5 * best
    assert 0.9 * best <= reached <= best + 1e-6
