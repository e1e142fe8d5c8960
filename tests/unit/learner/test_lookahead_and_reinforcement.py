"""Look-ahead predictions, and PPO: against loops, at the end of trajectories, and where PPO clips."""

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.objectives.config import ObjectiveConfig
from learner.objectives.lookahead import IGNORED, lookahead_loss, lookahead_targets
from learner.objectives.losses import objective_loss
from learner.objectives.reinforcement import ppo_loss
from learner.space import SequenceSpace
from tests import reference_objectives as reference
from tests.reference import draw_paths, fixed_space, real_steps, small_learner, variable_space
from tests.reference_objectives import random_toy

SPACES = [fixed_space(3, 3), variable_space(2, 4, 0), variable_space(3, 3, 2)]


# --- look-ahead -------------------------------------------------------------------------------------------------------


def test_targets_are_the_next_tokens_and_end_with_the_sequence():
    tokens = torch.tensor([[5, 6, 7, 8], [3, 4, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    targets = lookahead_targets(tokens, mask, 3)
    x = IGNORED
    assert targets.tolist() == [
        [[5, 6, 7], [6, 7, 8], [7, 8, x], [8, x, x]],
        [[3, 4, x], [4, x, x], [x, x, x], [x, x, x]],
    ]
    assert lookahead_targets(tokens, mask, 1).tolist() == [[[5], [6], [7], [8]], [[3], [4], [x], [x]]]
    assert lookahead_targets(tokens, mask, 6)[0, 0].tolist() == [5, 6, 7, 8, x, x]  # further than any sequence


@pytest.mark.parametrize("num_ahead", [1, 2, 5])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_lookahead_equals_its_reference(space: SequenceSpace, num_ahead: int):
    toy = random_toy(space, ahead=num_ahead)
    step = toy.step(ObjectiveConfig(lookahead_weight=1.0, lookahead_steps=num_ahead))
    loss = lookahead_loss(step.lookahead_logits, lookahead_targets(step.tokens, step.mask, num_ahead))
    assert float(loss) == pytest.approx(reference.lookahead_ce(toy.paths(), num_ahead), rel=1e-12)


def test_targets_past_the_end_have_no_gradient():
    step = random_toy(SPACES[1]).step(ObjectiveConfig(lookahead_weight=1.0))
    logits = step.lookahead_logits.clone().requires_grad_()
    targets = lookahead_targets(step.tokens, step.mask, 3)
    (gradient,) = torch.autograd.grad(lookahead_loss(logits, targets), logits)
    beyond = torch.arange(4)[:, None] + torch.arange(3) >= step.num_steps[:, None, None]  # t + k at or past the end
    assert (gradient[beyond] == 0).all()
    assert (gradient[~beyond].abs().sum(-1) > 0).all()


def test_lookahead_gradient_is_that_of_differences():
    step = random_toy(SPACES[2], count=3).step(ObjectiveConfig(lookahead_weight=1.0))
    targets = lookahead_targets(step.tokens, step.mask, 3)
    logits = step.lookahead_logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: lookahead_loss(values, targets), [logits])


def test_a_learner_predicts_tokens_as_often_as_they_occur():
    """At the root, what the first token is; at the others, what follows the prefix."""
    space = fixed_space(2, 2)
    batch = draw_paths(space, np.broadcast_to(np.array([[0.9, 0.1], [0.2, 0.8]]), (2, 2, 2)), 200, seed=3)
    objective = {"lookahead_weight": 1.0, "lookahead_steps": 2}
    learner = small_learner(space, objective=objective, learner={"batch_size": 200}, total_steps=300)
    for _ in range(300):
        metrics = learner.update(batch)
    counts: dict[tuple, list[int]] = {}
    for b, t, prefix, _, _ in real_steps(batch):
        for ahead in range(2 - t):
            counts.setdefault((prefix, ahead), []).append(int(batch.tokens[b, t + ahead]))
    surprise = sum(reference.entropy(np.bincount(seen) / len(seen)) * len(seen) for seen in counts.values())
    least = surprise / sum(len(seen) for seen in counts.values())
    assert metrics["lookahead_ce"] == pytest.approx(least, abs=2e-3)
    assert metrics["lookahead_ce"] >= least - 1e-5


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_lookahead_adds_its_weight_to_the_loss(weight: float):
    toy = random_toy(SPACES[1])
    loss, metrics = objective_loss(toy.step(ObjectiveConfig(lookahead_weight=weight)))
    assert float(loss) == pytest.approx(
        float(metrics["balance_loss"]) + weight * float(metrics["lookahead_ce"]), rel=1e-12
    )


# --- PPO --------------------------------------------------------------------------------------------------------------

CLIP = 0.2


def single_step(ratio: float, gain: float) -> tuple[float, float]:
    """Loss without value error, and its gradient to log π, of one step whose probability changed by `ratio`."""
    log_pf = torch.tensor([[np.log(0.3 * ratio)]]).requires_grad_()
    value, known = torch.zeros(1, 1), torch.tensor([[np.log(0.3)]])
    loss = ppo_loss(
        log_pf, known, value, torch.tensor([gain]), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool),
        clip=CLIP, entropy_weight=0.0,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, log_pf)
    return float(loss.detach()) - 0.5 * gain**2, float(gradient)


@pytest.mark.parametrize("gain", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.2, 0.75, 0.9, 1.0, 1.1, 1.3, 4.0])
def test_ppo_rewards_changes_up_to_its_limit(ratio: float, gain: float):
    loss, gradient = single_step(ratio, gain)
    assert loss == pytest.approx(-reference.ppo_step(ratio, gain, CLIP), rel=1e-5)
    beyond = ratio > 1 + CLIP if gain > 0 else ratio < 1 - CLIP
    assert gradient == pytest.approx(0 if beyond else -ratio * gain, rel=1e-5)  # wrong turns are never clipped


def test_ppo_at_the_behaviour_is_the_policy_gradient():
    generator, options = torch.Generator().manual_seed(2), {"dtype": torch.float64}
    logits = torch.randn(5, 3, 4, generator=generator, **options).requires_grad_()
    values, returns = torch.randn(5, 3, generator=generator, **options), torch.rand(5, generator=generator, **options)
    actions, mask = torch.randint(4, (5, 3, 1), generator=generator), torch.ones(5, 3, dtype=torch.bool)
    log_pf = logits.log_softmax(-1).gather(-1, actions)[..., 0]
    options = {"clip": CLIP, "entropy_weight": 0.0}
    loss = ppo_loss(log_pf, log_pf.detach(), values, returns, torch.zeros_like(log_pf), mask, **options)
    plain = -((returns[:, None] - values) * log_pf).mean()
    found, expected = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, plain))
    torch.testing.assert_close(found, expected)


def ppo_of(log_pf: Tensor, log_behaviour: Tensor, mask: Tensor) -> Tensor:
    values, entropies = torch.full_like(log_pf, 0.3), torch.full_like(log_pf, 0.5)
    return ppo_loss(log_pf, log_behaviour, values, torch.ones(2), entropies, mask, clip=CLIP, entropy_weight=0.1)


def test_steps_of_unknown_behaviour_add_nothing():
    log_pf = torch.tensor([[-1.0, -2.0], [-0.5, -0.7]]).requires_grad_()
    behaviour = torch.tensor([[-1.1, -1.9], [torch.nan, torch.nan]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    loss = ppo_of(log_pf, behaviour, mask)
    (gradient,) = torch.autograd.grad(loss, log_pf)
    assert torch.isfinite(loss)
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).all()
    alone = ppo_of(log_pf, behaviour.nan_to_num(-0.6), torch.tensor([[True] * 2, [False] * 2]))
    assert float(loss.detach()) == pytest.approx(float(alone.detach()))
    unknown = ppo_of(log_pf, torch.full_like(behaviour, torch.nan), mask)
    assert float(unknown.detach()) == 0


def test_entropy_bonus_raises_the_entropy():
    toy = random_toy(SPACES[1])
    for weight in (0.1, 0.5):
        tensors = [toy.step(ObjectiveConfig(name="ppo", ppo_entropy_weight=w)) for w in (0.0, weight)]
        losses = [float(objective_loss(each)[0]) for each in tensors]
        known = [(path, t) for path in toy.paths() for t in path.steps if not np.isnan(path.log_behaviour[t])]
        bonus = sum(reference.entropy(path.policy[t]) for path, t in known) / len(known)
        assert losses[0] - losses[1] == pytest.approx(weight * bonus, rel=1e-9)
