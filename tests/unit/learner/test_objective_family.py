"""Every objective: its loss against loops over plain probabilities, identities between them, perfect flows, gradients."""

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.environments.noise import UniformSubstitution
from learner.objectives import balance, entropy, reinforcement
from learner.objectives.config import ObjectiveConfig
from learner.objectives.losses import LOSSES, objective_loss
from learner.space import SequenceSpace
from tests import reference_objectives as reference
from tests.reference import draw_paths, fixed_space, randomise, small_learner, variable_space
from tests.reference_objectives import Toy, perfect_toy, random_toy, step_of

SPACES = [fixed_space(3, 3), variable_space(2, 4, 0), variable_space(3, 3, 2)]
WEIGHTED = {"kl_weight": 0.7, "exploration_weight": 0.4}
SUPPORT = {"backward": "learned", "backward_support": 0.15}
OBJECTIVES = [
    {"name": "sgfn_marginal"},
    {"name": "sgfn_marginal", "gamma": 0.2} | WEIGHTED,
    {"name": "sgfn_db"},
    {"name": "sgfn_db", **SUPPORT},
    {"name": "sgfn_kl"},
    {"name": "sgfn_kl", "kl": "posterior", "gamma": 0.9, "entropy_quantile": 1.0} | WEIGHTED,
    {"name": "sgfn_kl", **SUPPORT, "max_importance_weight": 1.1, "entropy_quantile": 0.6} | WEIGHTED,
    {"name": "gfn_db"},
    {"name": "gfn_db"} | WEIGHTED,
    {"name": "tb"},
    {"name": "tb", **SUPPORT, "kl_weight": 0.3},
    {"name": "subtb"},
    {"name": "subtb", **SUPPORT, "subtb_decay": 0.3},
    {"name": "subtb", "subtb_decay": 3.0, "exploration_weight": 0.4},
    {"name": "tb", "dynamics": "none"},
    {"name": "subtb", "dynamics": "none", "kl_weight": 0.3},
    {"name": "soft_q"},
    {"name": "soft_q", "kl_weight": 0.3},
    {"name": "ppo", "ppo_entropy_weight": 0.3},
    {"name": "ppo", "ppo_clip": 0.05, "exploration_weight": 0.4},
    {"name": "sgfn_db", "lookahead_weight": 0.6, "lookahead_steps": 3},
]
STOCHASTIC = [
    {"name": name, **b} for name in ("sgfn_db", "sgfn_kl", "tb", "subtb") for b in ({}, {"backward": "learned"})
]
STOCHASTIC.append({"name": "sgfn_marginal"})
"""Balance objectives with dynamics."""
DETERMINISTIC = [{"name": "gfn_db"}, {"name": "soft_q"}, *({"name": n, "dynamics": "none"} for n in ("tb", "subtb"))]
WITHOUT_TERMS = {"kl_weight": 0.0, "exploration_weight": 0.0}


def noise(space: SequenceSpace, alpha: float) -> np.ndarray:
    return UniformSubstitution(alpha).kernel(space.allowed)


def loss_of(toy: Toy, **objective) -> float:
    return float(objective_loss(toy.step(ObjectiveConfig(**objective)))[0])


def leaves(toy: Toy) -> dict[str, Tensor]:
    """The tensors of a toy, those that networks give as leaves of the graph."""
    tensors = toy.tensors()
    for name in ("log_flow", "log_policy", "backward_logits", "lookahead_logits"):
        tensors[name] = tensors[name].clone().requires_grad_()
    return tensors


def gradients(tensors: dict[str, Tensor], objective: dict) -> dict[str, Tensor]:
    """Of the loss, by name; zeros where it reads nothing."""
    names = [name for name, value in tensors.items() if value.requires_grad]
    loss, _ = objective_loss(step_of(tensors, ObjectiveConfig(**objective)))
    found = torch.autograd.grad(loss, [tensors[name] for name in names], allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


# --- against the references -------------------------------------------------------------------------------------------


def test_all_objectives_are_tested():
    assert {objective["name"] for objective in OBJECTIVES} == set(LOSSES)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_loss_equals_its_reference(space: SequenceSpace, objective: dict):
    config, toy = ObjectiveConfig(**objective), random_toy(space)
    weights = config.weight("kl_weight"), config.weight("exploration_weight")
    loss, metrics = objective_loss(toy.step(config))
    assert float(loss) == pytest.approx(reference.total_loss(toy.paths(), config, *weights), rel=1e-6)
    assert float(metrics["balance_loss"]) == pytest.approx(reference.base_loss(toy.paths(), config), rel=1e-6)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_metrics_of_the_terms_equal_their_references(space: SequenceSpace):
    config = ObjectiveConfig(name="sgfn_kl", lookahead_weight=0.5, lookahead_steps=3, gamma=0.3)
    toy = random_toy(space)
    paths, (_, metrics) = toy.paths(), objective_loss(toy.step(config))
    entropies = [[reference.normalised_entropy(path.policy[t]) for t in path.steps] for path in paths]
    ratios = np.asarray([reference.entropy_ratio(each, 0.3, 0.75) for each in entropies])
    for column, name in enumerate(("entropy_high", "entropy_low", "entropy_ratio", "entropy_share")):
        assert float(metrics[name]) == pytest.approx(ratios[:, column].mean(), rel=1e-6)
    explored = [
        reference.exploration_term(h, ratio[3], 0.3)
        for each, ratio in zip(entropies, ratios, strict=True)
        for h in each
    ]
    assert float(metrics["exploration_loss"]) == pytest.approx(np.mean(explored), rel=1e-6)
    assert float(metrics["trajectory_kl"]) == pytest.approx(reference.trajectory_kl(paths, config), rel=1e-9)
    assert float(metrics["lookahead_ce"]) == pytest.approx(reference.lookahead_ce(paths, 3), rel=1e-9)


def test_metrics_name_only_terms_that_count():
    terms = {"entropy_high", "entropy_low", "entropy_ratio", "entropy_share", "trajectory_kl", "exploration_loss"}
    for objective, expected in [
        ({"name": "sgfn_db"}, set()),
        ({"name": "sgfn_kl"}, terms),
        ({"name": "sgfn_kl", "kl_weight": 0.0}, terms - {"trajectory_kl"}),
        ({"name": "sgfn_kl", "exploration_weight": 0.0}, terms - {"exploration_loss"}),
        ({"name": "sgfn_kl", **WITHOUT_TERMS}, set()),
        ({"name": "ppo", "exploration_weight": 0.1}, terms - {"trajectory_kl"}),
        ({"name": "gfn_db", "lookahead_weight": 0.1}, {"lookahead_ce"}),
    ]:
        _, metrics = objective_loss(random_toy(SPACES[1]).step(ObjectiveConfig(**objective)))
        assert set(metrics) == expected | {"balance_loss"}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_padding_does_not_count(objective: dict):
    toy = random_toy(SPACES[1])
    tensors = toy.tensors()
    padding = ~tensors["mask"]
    assert padding.any()
    other = {name: value.clone() for name, value in tensors.items()}
    for name in ("log_policy", "log_dynamics", "backward_logits", "lookahead_logits"):
        other[name][padding] = -2.0
    other["log_flow"][torch.arange(5) > toy.tensors()["num_steps"][:, None]] = -7.0
    other["tokens"][padding], other["actions"][padding] = 1, 2
    config = ObjectiveConfig(**objective)
    assert torch.equal(objective_loss(step_of(tensors, config))[0], objective_loss(step_of(other, config))[0])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_forbidden_intentions_do_not_count(objective: dict):
    """Whatever a dynamics model or a backward head says of them."""
    tensors, config = random_toy(SPACES[2]).tensors(), ObjectiveConfig(**objective)
    forbidden = tensors["log_policy"].isneginf()
    assert forbidden.any()
    other = tensors | {name: tensors[name].clone() for name in ("log_dynamics", "backward_logits")}
    other["log_dynamics"][forbidden], other["backward_logits"][forbidden] = -0.1, 3.0
    assert torch.equal(objective_loss(step_of(tensors, config))[0], objective_loss(step_of(other, config))[0])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_padding_gets_no_gradient(objective: dict):
    tensors = leaves(random_toy(SPACES[1]))
    padding = ~tensors["mask"]
    found = gradients(tensors, objective)
    for name in ("log_policy", "backward_logits", "lookahead_logits"):
        assert (found[name][padding] == 0).all()
    assert (found["log_flow"][torch.arange(5) > tensors["num_steps"][:, None]] == 0).all()
    assert found["log_policy"].abs().max() > 0
    assert (found["log_flow"][:, 0] != 0).sum() >= 20  # the root is in the loss


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_without_noise_the_stochastic_objectives_are_the_deterministic_one(space: SequenceSpace):
    toy = random_toy(space, noise(space, 0.0))
    objectives = [
        {"name": "gfn_db"},
        {"name": "sgfn_marginal"},
        {"name": "sgfn_db"},
        {"name": "sgfn_db", "backward": "learned"},
    ]
    expected = gradients(leaves(toy), objectives[0])
    for name in ("tb", "subtb"):
        assert loss_of(toy, name=name) == pytest.approx(loss_of(toy, name=name, dynamics="none"), rel=1e-12)
    for objective in objectives:
        assert loss_of(toy, **objective) == pytest.approx(loss_of(toy, name="gfn_db"), rel=1e-12)
        found = gradients(leaves(toy), objective)
        for name in ("log_policy", "log_flow"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12)
        assert (found["backward_logits"] == 0).all()  # nothing to learn: P_B = 1


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_posterior_and_marginal_balance_are_one_loss_with_one_gradient(space: SequenceSpace):
    toy = random_toy(space)
    found = [gradients(leaves(toy), {"name": name}) for name in ("sgfn_db", "sgfn_marginal")]
    assert loss_of(toy, name="sgfn_db") == pytest.approx(loss_of(toy, name="sgfn_marginal"), rel=1e-12)
    for name in ("log_policy", "log_flow"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backward", ["posterior", "learned"])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_trajectory_residual_is_the_sum_of_detailed_ones(space: SequenceSpace, backward: str):
    step = random_toy(space).step(ObjectiveConfig(backward=backward))
    residuals = balance.tb_residuals(step.log_flow[:, 0], step.log_ratio, step.log_reward, step.mask)
    torch.testing.assert_close(residuals, step.residuals.sum(1), rtol=0, atol=1e-12)
    shifted = balance.tb_residuals(torch.tensor(2.5), step.log_ratio, step.log_reward, step.mask)
    torch.testing.assert_close(shifted, residuals - step.log_flow[:, 0] + 2.5)


@pytest.mark.parametrize("backward", ["posterior", "learned"])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_limits_of_sub_trajectory_balance(space: SequenceSpace, backward: str):
    toy = random_toy(space)
    step = toy.step(ObjectiveConfig(backward=backward))
    detailed = (step.residuals.square().sum(1) / step.num_steps).mean()
    nearly = balance.subtb_loss(step.residuals, step.num_steps, decay=1e-12)
    assert float(nearly) == pytest.approx(float(detailed), rel=1e-9)
    nearly = balance.subtb_loss(step.residuals, step.num_steps, decay=1e12)
    assert float(nearly) == pytest.approx(loss_of(toy, name="tb", backward=backward), rel=1e-9)


def test_sub_trajectories_of_decay_one_count_alike():
    residuals = torch.tensor([[1.0, -2.0, 4.0], [3.0, 0.0, 0.0]])
    every = np.mean([np.mean(np.square([1, -2, 4, -1, 2, 3])), 9.0])
    assert float(balance.subtb_loss(residuals, torch.tensor([3, 1]), decay=1.0)) == pytest.approx(every)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", [1e-6, 0.03, 1.0, 100.0])
def test_long_trajectories_overflow_under_no_decay(decay: float, dtype: torch.dtype):
    num_steps = torch.tensor([50, 30, 1, 49])
    mask, generator = balance.step_mask(num_steps, 50), torch.Generator().manual_seed(0)
    residuals = torch.where(mask, 3 * torch.randn(4, 50, generator=generator, dtype=torch.float64), 0.0)
    leaf = residuals.to(dtype).requires_grad_()
    loss = balance.subtb_loss(leaf, num_steps, decay=decay)
    rows = [row[:n].tolist() for row, n in zip(residuals, num_steps, strict=True)]
    expected = np.mean([reference.subtb_loss(row, decay) for row in rows])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-4)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(gradient).all()
    assert (gradient[mask].abs() > 0).all()
    assert (gradient[~mask] == 0).all()


# --- perfect flows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.9, None])
def test_perfect_flows_leave_no_residual(space: SequenceSpace, alpha: float | None):
    """The target is the law of some policy under the noise, hence attainable; None: noise without any structure."""
    kernel = reference.random_kernel(space, np.random.default_rng(9)) if alpha is None else noise(space, alpha)
    toy = perfect_toy(space, kernel)
    for objective in STOCHASTIC:
        objective = objective | WITHOUT_TERMS | {"backward_support": 1e-9}
        assert loss_of(toy, **objective) < 1e-18
        for name, gradient in gradients(leaves(toy), objective).items():
            assert gradient.abs().max() < 1e-8, name
    for objective in DETERMINISTIC:
        if alpha == 0:
            assert loss_of(toy, **objective) < 1e-18
        else:
            assert loss_of(toy, **objective) > 1e-3  # they ignore the noise: not their solution


@pytest.mark.parametrize("backward", ["posterior", "learned"])
def test_perfect_flows_have_no_divergence(backward: str):
    toy = perfect_toy(SPACES[1], noise(SPACES[1], 0.25))
    config = ObjectiveConfig(name="sgfn_kl", backward=backward, backward_support=1e-9)
    assert abs(float(objective_loss(toy.step(config))[1]["trajectory_kl"])) < 1e-6  # behaviour is float32


def test_imperfect_flows_leave_a_residual():
    toy = perfect_toy(SPACES[1], noise(SPACES[1], 0.25))
    toy.flows[2][1] += 0.5
    for objective in STOCHASTIC:
        if objective["name"] == "tb":
            assert loss_of(toy, **objective, backward_support=1e-9) < 1e-18  # reads no flow but that of the root
        else:
            assert loss_of(toy, **objective, **WITHOUT_TERMS, backward_support=1e-9) > 1e-3


# --- gradients --------------------------------------------------------------------------------------------------------


DIFFERENTIABLE = [
    {"name": "sgfn_marginal"},
    {"name": "gfn_db"},
    {"name": "sgfn_db", "lookahead_weight": 0.5},
    {"name": "sgfn_db", "backward": "learned"},
    {"name": "tb"},
    {"name": "tb", "backward": "learned"},
    {"name": "subtb", "subtb_decay": 0.5},
    {"name": "subtb", "subtb_decay": 2.0, "backward": "learned"},
    {"name": "sgfn_kl", "kl": "posterior", "kl_weight": 0.5, "exploration_weight": 0.0},
]
"""Nothing in them is held fixed, so that differences of the loss tell their gradient."""


@pytest.mark.parametrize("objective", DIFFERENTIABLE, ids=str)
@pytest.mark.parametrize("space", [SPACES[0], SPACES[2]], ids=str)
def test_gradient_of_the_loss(space: SequenceSpace, objective: dict):
    tensors, config = random_toy(space, noise(space, 0.25), count=3).tensors(), ObjectiveConfig(**objective)
    forbidden = tensors["log_policy"].isneginf()
    names = ("log_policy", "log_flow", "backward_logits", "lookahead_logits")
    inputs = [tensors[name].masked_fill(tensors[name].isinf(), 0.0).requires_grad_() for name in names]

    def loss(logits: Tensor, flows: Tensor, head: Tensor, ahead: Tensor) -> Tensor:
        log_policy = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)
        given = dict(zip(names, (log_policy, flows, head, ahead), strict=True))
        return objective_loss(step_of(tensors | given, config))[0]

    assert torch.autograd.gradcheck(loss, inputs)


def test_gradient_of_exploration_at_a_fixed_share():
    step = random_toy(SPACES[2]).step(ObjectiveConfig())
    logits = step.log_policy.masked_fill(step.log_policy.isinf(), 0.0)[:3].requires_grad_()
    forbidden, mask = step.log_policy[:3].isneginf(), step.mask[:3]
    share = torch.tensor([[0.3], [0.7], [0.9999]], dtype=torch.float64)

    def loss(values: Tensor, shares: Tensor) -> Tensor:
        entropies = entropy.normalised_entropy(values.masked_fill(forbidden, -torch.inf).log_softmax(-1))
        return entropy.exploration_loss(entropies, shares, mask, gamma=0.3)

    assert torch.autograd.gradcheck(lambda values: loss(values, share), [logits])
    share.requires_grad_()
    assert torch.autograd.grad(loss(logits, share), share, allow_unused=True) == (None,)


def test_gradient_of_ppo_at_fixed_advantages():
    toy = random_toy(SPACES[1], count=6)
    step = toy.step(ObjectiveConfig(name="ppo"))
    returns, values = step.log_reward.exp(), step.log_flow[:, :-1].clone().requires_grad_()
    logits = step.log_policy.clone().requires_grad_()

    def loss(log_policy: Tensor, values: Tensor) -> Tensor:
        return reinforcement.ppo_loss(
            balance.at(log_policy, step.actions), step.log_behaviour, values, returns, entropy.policy_entropy(log_policy),
            step.mask, clip=0.2, entropy_weight=0.1,
        )  # fmt: skip

    assert torch.autograd.gradcheck(lambda x: loss(x.log_softmax(-1), values.detach()), [logits])
    (found,) = torch.autograd.grad(loss(logits, values), values)
    known = step.mask & ~step.log_behaviour.isnan()
    expected = torch.where(known, values.detach() - returns[:, None], 0.0) / known.sum()
    torch.testing.assert_close(found, expected)  # of the squared error alone: the advantage is held fixed


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_soft_q_holds_the_next_value_fixed(space: SequenceSpace):
    """Each entry of log F is the value of one state of one trajectory, so its gradient is that of its own residual."""
    tensors = leaves(random_toy(space))
    step = step_of(tensors, ObjectiveConfig(name="soft_q"))
    residuals = step.residuals.detach()  # the values are those of detailed balance
    own = 2 * torch.nn.functional.pad(residuals, (0, 1)) / step.mask.sum()
    found = gradients(tensors, {"name": "soft_q"})
    torch.testing.assert_close(found["log_flow"], own)
    both = gradients(tensors, {"name": "gfn_db"})
    torch.testing.assert_close(both["log_flow"], own - own.roll(1, 1))
    torch.testing.assert_close(found["log_policy"], both["log_policy"])


def test_gradient_of_soft_q_is_that_of_a_frozen_target():
    toy, h = random_toy(SPACES[1], count=8), 1e-6
    paths, found = toy.paths(), gradients(leaves(toy), {"name": "soft_q"})
    targets = [np.log(path.flows[1:]) for path in paths]
    for b, path in enumerate(paths):
        for t in path.steps:
            losses = []
            for sign in (1, -1):
                moved = path.flows.copy()
                moved[t] *= np.exp(sign * h)
                changed = [*paths[:b], path._replace(flows=moved), *paths[b + 1 :]]
                losses.append(reference.soft_q_loss(changed, targets))
            assert float(found["log_flow"][b, t]) == pytest.approx((losses[0] - losses[1]) / (2 * h), abs=1e-7)


@pytest.mark.parametrize("certainty", [5.0, 40.0, 85.0, 120.0, 500.0])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradients_stay_finite_near_certainty(objective: dict, certainty: float):
    """Policy and dynamics whose log-odds are `certainty`, float32, an end that is forbidden at first."""
    space, generator = SPACES[2], torch.Generator().manual_seed(1)
    tensors = random_toy(space).tensors()
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    forbidden = tensors["log_policy"].isneginf()
    assert forbidden.any()
    steps = tensors["mask"].shape
    favourite = torch.randint(space.num_tokens, steps, generator=generator)[..., None]
    logits = torch.zeros(*steps, space.num_actions).scatter(-1, favourite, certainty).requires_grad_()
    tensors["log_policy"] = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)
    realised = torch.full((*steps, space.num_actions), -certainty).scatter(-1, tensors["tokens"][..., None], -1e-3)
    tensors["log_dynamics"] = realised.masked_fill(forbidden, -certainty)
    flows = tensors["log_flow"].clone().requires_grad_()
    head = (certainty * torch.randn(realised.shape, generator=generator)).requires_grad_()
    tensors |= {"log_flow": flows, "backward_logits": head}
    loss, metrics = objective_loss(step_of(tensors, ObjectiveConfig(**objective)))
    found = torch.autograd.grad(loss, [logits, flows, head], allow_unused=True, materialize_grads=True)
    assert all(torch.isfinite(value).all() for value in (loss, *found, *metrics.values()))
    assert (found[0][forbidden] == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_learners_with_extreme_networks_stay_finite(objective: dict):
    space = variable_space(2, 5, 3)
    learner = small_learner(space, objective=objective)
    randomise(learner.policy, seed=1, scale=1.0)
    randomise(learner.dynamics, seed=2, scale=3.0)
    for seed in range(2):
        metrics = learner.update(draw_paths(space, noise(space, 0.2), 32, seed))
        assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert np.isfinite(learner.weights()).all()


@pytest.mark.parametrize("certainty", [92.0, 95.0, 98.0, 103.0])
def test_gradients_stay_finite_where_entropies_are_denormal(certainty: float):
    logits = torch.tensor([[[0.0, -certainty]] * 2]).requires_grad_()
    entropies = entropy.normalised_entropy(logits.log_softmax(-1))
    ratio = entropy.entropy_ratio(entropies, torch.ones(1, 2, dtype=torch.bool), gamma=0.1, quantile=0.75)
    (gradient,) = torch.autograd.grad(ratio.ratio.log().mean(), logits)
    assert torch.isfinite(gradient).all()
    assert 1 - 1e-4 <= float(ratio.ratio.detach()) <= 10 * (1 + 1e-4)
