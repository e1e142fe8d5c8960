"""The reward model: what it learns, symmetry, gradients, held-out sequences, and going on from a checkpoint."""

from typing import Any

import numpy as np
import pytest
import torch

from actors.oracles.tfbind8 import e_score_table
from learner.checkpoint import load_checkpoint, save_checkpoint
from learner.drakes.labelled import LabelledRing, held_out, sequence_hash
from learner.drakes.metrics import correlation, rank_correlation
from learner.drakes.reverse_complement import reverse_complement_one_hot
from learner.drakes.reward_model import RewardModel, RewardModelConfig, RewardTrainer, frozen, one_hot, reward_loss
from learner.strands import reverse_complement

SMALL = {"batch_size": 64, "warm_start_steps": 200}
SHAPES = [("cnn", 8, 0), ("cnn", 24, 1), ("mlp", 8, 1)]


def make(
    length: int = 8, *, kind: str = "cnn", num_layers: int = 0, hidden_size: int = 16, seed: int = 0, **settings: Any
) -> RewardTrainer:
    network = {"kind": kind, "num_layers": num_layers, "hidden_size": hidden_size}
    config = RewardModelConfig(**{**SMALL, "network": network, **settings})
    return RewardTrainer(RewardModel(config, length, seed=seed), seed=seed)


def random_tokens(count: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, size=(count, length))


def additive(tokens: np.ndarray, *, symmetric: bool) -> np.ndarray:
    """Sum of a number for each letter at each position; with `symmetric` over both strands."""
    weights = np.random.default_rng(99).normal(size=(tokens.shape[1], 4))

    def one(rows: np.ndarray) -> np.ndarray:
        return weights[np.arange(rows.shape[1]), rows].sum(1)

    return 5 + 3 * (one(tokens) + one(reverse_complement(tokens)) if symmetric else one(tokens))


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_learns_an_additive_function_of_8_letters(kind, symmetric):
    trainer, tokens = make(kind=kind, hidden_size=32, rc_symmetric=symmetric), random_tokens(2000, 8, seed=1)
    trainer.warm_start(tokens, additive(tokens, symmetric=symmetric))
    fresh = random_tokens(1000, 8, seed=2)
    predicted, expected = trainer.model.predict(fresh), additive(fresh, symmetric=symmetric)
    assert np.corrcoef(predicted, expected)[0, 1] > 0.95
    assert np.abs(predicted - expected).mean() < 0.3 * expected.std()
    assert trainer.holdout_correlation() > 0.9


def test_a_convolutional_one_finds_a_motif_wherever_it_is():
    rng, motif = np.random.default_rng(3), np.array([2, 0, 3, 3])
    tokens, planted = random_tokens(2000, 24, seed=4), rng.random(2000) < 0.5
    for row in np.flatnonzero(planted):
        start = rng.integers(20)
        tokens[row, start : start + 4] = motif if rng.random() < 0.5 else reverse_complement(motif)
    trainer = make(24, warm_start_steps=150)
    trainer.warm_start(tokens[:1500], planted[:1500].astype(np.float32))
    assert rank_correlation(trainer.model.predict(tokens[1500:]), planted[1500:]) > 0.7


@pytest.mark.parametrize(("kind", "length", "num_layers"), SHAPES)
def test_both_strands_have_one_reward(kind, length, num_layers):
    x = torch.rand(20, length, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    model = make(length, kind=kind, num_layers=num_layers, pessimism=1.0).model
    torch.testing.assert_close(model(reverse_complement_one_hot(x)), model(x), atol=1e-6, rtol=0)
    one_stranded = make(length, kind=kind, num_layers=num_layers, rc_symmetric=False).model
    assert (one_stranded(reverse_complement_one_hot(x)) - one_stranded(x)).abs().max() > 1e-4


@pytest.mark.parametrize(("kind", "length", "num_layers"), SHAPES)
def test_the_gradient_reaches_the_input(kind, length, num_layers):
    model = make(length, kind=kind, num_layers=num_layers, hidden_size=4, pessimism=0.5).model.double().eval()
    x = torch.rand(2, length, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    with frozen(model):
        assert torch.autograd.gradcheck(model, x.requires_grad_())
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert (gradient.abs().sum((1, 2)) > 0).all()


def test_the_defaults_rank_the_measured_8_mers_of_a_factor():
    """Pearson correlation with all of SIX6 from 4,000 labels of the lower half, then 4,000 uniform ones and 300 steps: three
    seeds gave
    .695 to .724, then .848 to .852 (a perceptron .604 to .635, then .797 to .801)."""
    scores, tokens = e_score_table("SIX6_REF_R1"), np.stack(np.unravel_index(np.arange(4**8), (4,) * 8), 1)
    rng, trainer = np.random.default_rng(0), RewardTrainer(RewardModel(RewardModelConfig(), 8, seed=0), seed=0)
    low = rng.choice(np.flatnonzero(scores <= np.median(scores)), 4000, replace=False)
    trainer.warm_start(tokens[low], scores[low])
    assert correlation(trainer.model.predict(tokens), scores) > 0.66
    drawn = rng.choice(len(scores), 4000, replace=False)
    trainer.add(tokens[drawn], scores[drawn])
    for _ in range(200):
        trainer.step()
    assert correlation(trainer.model.predict(tokens), scores) > 0.82
    assert trainer.holdout_correlation(400) > 0.7


def test_members_differ_and_pessimism_takes_off_their_spread():
    trainer = make(pessimism=2.0)
    x = torch.rand(10, 8, 4)
    members = trainer.model.members(x)
    assert members.shape == (3, 10)
    assert members.std(0).min() > 0
    torch.testing.assert_close(trainer.model(x), members.mean(0) - 2 * members.std(0, correction=0))
    alone = make(num_members=1, pessimism=2.0).model
    torch.testing.assert_close(alone(x), alone.members(x)[0])


def test_equal_members_have_a_finite_gradient():
    model = make(pessimism=1.0).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    x = torch.rand(4, 8, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("kind", "length", "num_layers"), SHAPES)
def test_a_member_alone_computes_what_it_does_in_the_ensemble(kind, length, num_layers):
    """Batches of their own go to their members, and no member reads another's."""
    model, x = make(length, kind=kind, num_layers=num_layers).model, torch.rand(3, 5, length, 4)
    apart = model.members(x)
    for member in range(3):
        torch.testing.assert_close(model.members(x[member])[member], apart[member])


def test_the_scale_is_that_of_the_offline_rewards():
    trainer, tokens = make(warm_start_steps=0), random_tokens(500, 8, seed=5)
    rewards = additive(tokens, symmetric=True)
    trainer.warm_start(tokens, np.where(np.arange(500) == 7, np.nan, rewards))
    kept = np.delete(rewards, 7)
    standardised = trainer.model.standardise(torch.from_numpy(kept).float())
    assert float(standardised.mean()) == pytest.approx(0, abs=1e-5)
    assert float(standardised.std(correction=0)) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(
        trainer.model.in_oracle_units(standardised).double(), torch.from_numpy(kept), rtol=1e-5, atol=1e-5
    )
    assert len(trainer.labels) + len(trainer.held_out_labels) == 499
    with pytest.raises(ValueError, match="cannot be standardised"):
        trainer.model.set_scale(np.ones(3))


def test_the_pairwise_term_is_the_logistic_loss_of_neighbours():
    predicted, rewards = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    pairs = [(0, 2, 1), (1, 0, 0), (2, 1, -1)]
    expected = np.mean([np.log1p(np.exp(-float(predicted[0, i] - predicted[0, j]) * s)) * abs(s) for i, j, s in pairs])
    squared = float((predicted - rewards).square().mean())
    assert float(reward_loss(predicted, rewards)) == pytest.approx(squared)
    assert float(reward_loss(predicted, rewards, pairwise_weight=0.5)) == pytest.approx(squared + 0.5 * expected)


def test_a_tenth_is_held_out_strands_and_repetitions_together():
    tokens = random_tokens(20_000, 10, seed=6)
    apart = held_out(tokens, 0.1, rc_symmetric=True)
    assert apart.mean() == pytest.approx(0.1, abs=0.01)  # 4.7 standard errors
    np.testing.assert_array_equal(held_out(reverse_complement(tokens), 0.1, rc_symmetric=True), apart)
    np.testing.assert_array_equal(held_out(tokens.astype(np.uint8), 0.1, rc_symmetric=True), apart)
    assert (
        held_out(reverse_complement(tokens), 0.1, rc_symmetric=False) != held_out(tokens, 0.1, rc_symmetric=False)
    ).any()
    assert not held_out(tokens, 0.0, rc_symmetric=True).any()
    trainer = make(10)
    trainer.add(tokens[:5000], np.zeros(5000))
    trainer.add(reverse_complement(tokens[:5000]), np.zeros(5000))
    trained, kept = (
        {bytes(row) for row in ring.recent(10**6)[0]} for ring in (trainer.labels, trainer.held_out_labels)
    )
    assert kept
    assert not trained & kept
    assert not trained & {bytes(reverse_complement(np.frombuffer(row, np.uint8))) for row in kept}


def test_hashes_are_spread_and_the_same_everywhere():
    tokens = np.array([[0, 1, 2, 3, 3, 2, 1, 0]])
    assert sequence_hash(tokens).tolist() == [7918990842343424194]
    every = np.indices((4,) * 6).reshape(6, -1).T
    assert len(np.unique(sequence_hash(every))) == 4**6
    assert sequence_hash(np.zeros((1, 3), int)) != sequence_hash(np.zeros((1, 4), int))


def test_a_ring_keeps_the_newest_and_draws_them_more_often():
    ring, rng = LabelledRing(100, 2), np.random.default_rng(0)
    for start in range(0, 250, 50):
        ring.add(np.full((50, 2), start // 50), np.arange(start, start + 50))
    assert len(ring) == 100
    assert ring.recent(3)[1].tolist() == [247, 248, 249]
    assert sorted(ring.recent(1000)[1]) == list(range(150, 250))
    rows = ring.rows((2, 4000), rng, recent=10, recent_share=0.25)
    drawn = ring.rewards[rows]
    assert (drawn[:, :1000] >= 240).all()
    assert (drawn[:, 1000:] >= 240).mean() == pytest.approx(0.1, abs=0.02)
    assert len(np.unique(drawn)) == 100
    ring.add(np.zeros((130, 2)), np.arange(130))
    assert sorted(ring.recent(1000)[1]) == list(range(30, 130))


def test_online_steps_follow_a_reward_that_changes():
    trainer, tokens = make(warm_start_steps=100), random_tokens(600, 8, seed=7)
    trainer.warm_start(tokens, additive(tokens, symmetric=True))
    fresh = random_tokens(3000, 8, seed=8)
    before = rank_correlation(trainer.model.predict(fresh), (fresh == 2).sum(1) + (fresh == 1).sum(1))
    trainer.add(fresh, 5 + 3.0 * ((fresh == 2).sum(1) + (fresh == 1).sum(1)))
    for _ in range(150):
        trainer.step()
    after = rank_correlation(trainer.model.predict(fresh), (fresh == 2).sum(1) + (fresh == 1).sum(1))
    assert after > max(0.8, before + 0.2)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    trainer, tokens = make(warm_start_steps=20), random_tokens(400, 8, seed=9)
    trainer.warm_start(tokens, additive(tokens, symmetric=True))
    save_checkpoint(tmp_path / "c", trainer.state_dict())
    other = make(warm_start_steps=0, seed=5)
    other.load_state_dict(load_checkpoint(tmp_path / "c"))
    assert [other.step() for _ in range(3)] == [trainer.step() for _ in range(3)]
    np.testing.assert_array_equal(other.model.predict(tokens), trainer.model.predict(tokens))
    assert other.holdout_correlation() == trainer.holdout_correlation()
    with pytest.raises(ValueError, match="another capacity or length"):
        make(9).load_state_dict(trainer.state_dict())


def test_without_labels_there_is_nothing_to_learn_or_to_rank():
    trainer = make()
    with pytest.raises(ValueError, match="no labels"):
        trainer.step()
    assert np.isnan(trainer.holdout_correlation())
    assert trainer.model.predict(np.zeros((0, 8))).shape == (0,)


def test_frozen_restores_what_it_found():
    model = make().model.train()
    model.networks.head.bias.requires_grad_(False)
    with frozen(model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        model(torch.rand(2, 8, 4, requires_grad=True)).sum().backward()
    assert model.training
    assert model.networks.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["networks.head.bias"]
    assert all(p.grad is None for p in model.parameters())


def test_one_hot_of_tokens():
    x = one_hot(np.array([[0, 3]], dtype=np.uint8), torch.zeros((), dtype=torch.float64))
    assert x.tolist() == [[[1, 0, 0, 0], [0, 0, 0, 1]]]
    assert x.dtype == torch.float64
