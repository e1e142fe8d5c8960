"""Divergence, importance weights, entropies and their ratio: against enumerations of all trajectories, and their bounds."""

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.environments.noise import UniformSubstitution
from actors.trajectories import TrajectoryBatch
from learner.objectives import balance, divergence, entropy
from learner.objectives.config import ObjectiveConfig
from learner.objectives.losses import StepLogProbs, objective_loss
from learner.space import SequenceSpace
from tests import reference_objectives as reference
from tests.reference import fixed_space, prefix_row, random_kernel, random_rows, real_steps, variable_space
from tests.reference_objectives import every_path, perfect_toy

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
gammas = st.floats(1e-3, 1 - 1e-3)
quantiles = st.floats(0.5, 1, exclude_min=True)
FLOAT64 = {"dtype": torch.float64}
EVERY = slice(None)


class Enumeration(NamedTuple):
    """All trajectories of a noisy toy, under policies and backward policies that are tables of logits."""

    space: SequenceSpace
    batch: TrajectoryBatch
    mask: Tensor
    rows: Tensor
    """int64 [B, T]: row of s_t in a table of all prefixes."""
    log_dynamics: Tensor
    """[B, T, A]: log P(x_t|s_t,a)."""
    log_reward: Tensor

    @property
    def actions(self) -> Tensor:
        return torch.from_numpy(self.batch.actions.astype(np.int64))

    @property
    def tokens(self) -> Tensor:
        return torch.from_numpy(self.batch.tokens.astype(np.int64))

    def parameters(self, seed: int) -> tuple[Tensor, Tensor]:
        """Logits of the policy [N, A], and of P_B [N, A, A] by realised token, for N prefixes."""
        generator, size = torch.Generator().manual_seed(seed), int(self.rows.max()) + 1
        shape = (size, self.space.num_actions)
        logits = torch.randn(shape, generator=generator, **FLOAT64).requires_grad_()
        return logits, torch.randn(*shape, shape[1], generator=generator, **FLOAT64).requires_grad_()

    def log_policy(self, logits: Tensor) -> Tensor:
        forbidden = torch.from_numpy(~self.space.allowed)
        return logits[self.rows].masked_fill(forbidden, -torch.inf).log_softmax(-1)

    def backward_logits(self, head: Tensor) -> Tensor:
        return head[self.rows, self.tokens]

    def log_pf(self, logits: Tensor) -> Tensor:
        """log π of the intended actions [B, T]."""
        return torch.where(self.mask, balance.at(self.log_policy(logits), self.actions), 0.0)

    def log_pb(self, logits: Tensor, head: Tensor, backward: str) -> Tensor:
        """log P_B of the intended actions [B, T]."""
        if backward == "posterior":
            log_pb = balance.posterior_log_pb(self.log_policy(logits), self.log_dynamics, self.actions)
        else:
            log_pb = balance.learned_log_pb(self.backward_logits(head), self.log_dynamics, self.actions, support=1e-9)
        return torch.where(self.mask, log_pb, 0.0)

    @property
    def log_noise(self) -> Tensor:
        """log Π P(x_t|s_t,a_t), [B]."""
        return torch.where(self.mask, balance.at(self.log_dynamics, self.actions), 0.0).sum(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """P_F(τ) [B]."""
        return (self.log_pf(logits).sum(1) + self.log_noise).exp()

    def log_ratio(self, logits: Tensor, head: Tensor, backward: str) -> Tensor:
        """log P_F(τ) - log P_B(τ|x) - log R(x), [B]."""
        log_pf, log_pb = self.log_pf(logits).sum(1), self.log_pb(logits, head, backward).sum(1)
        return log_pf + self.log_noise - log_pb - self.log_reward

    @property
    def log_z(self) -> Tensor:
        rewards = {
            (n, *row): r
            for n, row, r in zip(self.batch.num_steps, self.batch.tokens.tolist(), self.log_reward, strict=True)
        }
        return torch.stack(list(rewards.values())).logsumexp(0)

    def divergence(self, logits: Tensor, head: Tensor, backward: str) -> Tensor:
        """D_KL(P_F(τ) ‖ P_B(τ|x)R(x)/Z), the sum over all trajectories."""
        return (self.probabilities(logits) * (self.log_ratio(logits, head, backward) + self.log_z)).sum()

    def surrogate(
        self,
        logits: Tensor,
        head: Tensor,
        backward: str,
        weights: Tensor,
        baseline: Tensor,
        part: slice | list[int] = EVERY,
    ) -> Tensor:
        """`flow_kl` of the trajectories in `part`."""
        return divergence.flow_kl(
            self.log_pf(logits)[part].sum(1),
            self.log_pb(logits, head, backward)[part].sum(1),
            self.log_ratio(logits, head, backward)[part],
            weights,
            baseline,
        )


def enumeration(space: SequenceSpace, kernel: np.ndarray | None = None) -> Enumeration:
    kernel = random_kernel(space, np.random.default_rng(4)) if kernel is None else kernel
    batch = every_path(space, kernel)
    num_steps = torch.from_numpy(batch.num_steps.astype(np.int64))
    rows = torch.zeros(len(batch), space.max_length, dtype=torch.int64)
    log_dynamics = torch.zeros(len(batch), space.max_length, space.num_actions, **FLOAT64)
    starts = np.cumsum([0, *(space.num_tokens**t for t in range(space.max_length))])
    for b, t, prefix, _, token in real_steps(batch):
        rows[b, t] = int(starts[t]) + prefix_row(space, prefix)
        log_dynamics[b, t] = torch.from_numpy(kernel[t, :, token]).log()
    log_reward = torch.from_numpy(2 * np.log(batch.scores.astype(np.float64)))
    return Enumeration(space, batch, balance.step_mask(num_steps, space.max_length), rows, log_dynamics, log_reward)


TOYS = {
    "noise": enumeration(fixed_space(2, 3), UniformSubstitution(0.25).kernel(fixed_space(2, 3).allowed)),
    "asymmetric": enumeration(fixed_space(2, 3)),
    "variable": enumeration(variable_space(2, 2, 1)),
}
SMALL = enumeration(fixed_space(2, 2))
"""Sixteen trajectories, so that all pairs can be listed."""


def gradients(value: Tensor, parameters: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


def assert_same_gradients(found: Tensor, expected: Tensor, parameters: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(gradients(found, parameters), gradients(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


# --- divergence of trajectories ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_the_enumeration_is_one(name: str):
    toy = TOYS[name]
    logits, head = toy.parameters(0)
    assert float(toy.probabilities(logits).detach().sum()) == pytest.approx(1, abs=1e-12)
    for backward in ("posterior", "learned"):
        target = (toy.log_pb(logits, head, backward).detach().sum(1) + toy.log_reward - toy.log_z).exp()
        assert float(target.sum()) == pytest.approx(1, abs=1e-12)  # P_B(τ|x)R(x)/Z is a law of trajectories
        assert float(toy.divergence(logits, head, backward).detach()) > 0.01


@pytest.mark.parametrize("baseline", [0.0, 3.7, -20.0])
@pytest.mark.parametrize("backward", ["posterior", "learned"])
@pytest.mark.parametrize("name", TOYS)
def test_flow_kl_has_the_gradient_of_the_divergence(name: str, backward: str, baseline: float):
    """The mean over the batch is turned into the expectation by weights P_F(τ)·B."""
    toy = TOYS[name]
    parameters = logits, head = toy.parameters(1)
    weights = toy.probabilities(logits).detach() * len(toy.batch)
    found = toy.surrogate(logits, head, backward, weights, torch.full_like(weights, baseline))
    expected = toy.divergence(logits, head, backward)
    assert_same_gradients(found, expected, parameters)
    assert gradients(expected, parameters)[0].abs().max() > 1e-3
    assert (gradients(found, parameters)[1].abs().max() > 1e-3) == (backward == "learned")


@pytest.mark.parametrize("backward", ["posterior", "learned"])
@pytest.mark.parametrize("name", TOYS)
def test_importance_weights_make_uniform_intentions_on_policy(name: str, backward: str):
    """Their expectation is exact as long as no weight is cut off."""
    toy = TOYS[name]
    parameters = logits, head = toy.parameters(2)
    log_uniform = toy.log_pf(torch.zeros_like(logits))
    weights = divergence.importance_weights(toy.log_pf(logits), log_uniform, limit=1e6)
    assert not weights.requires_grad
    drawn = (log_uniform.sum(1) + toy.log_noise).exp()  # behaviour's law of trajectories
    assert float((drawn * weights).sum()) == pytest.approx(1, abs=1e-12)
    weights = weights * drawn * len(toy.batch)
    found = toy.surrogate(logits, head, backward, weights, torch.full_like(weights, 1.3))
    assert_same_gradients(found, toy.divergence(logits, head, backward), parameters)


def test_importance_weights_of_trajectories():
    log_pf = torch.tensor([[0.5, 0.4], [0.9, 0.5], [0.9, 1.0], [0.2, 0.2], [1.0, 1.0]]).log().requires_grad_()
    behaviour = torch.tensor([[0.5, 0.8], [0.3, 0.5], [0.1, 1.0], [torch.nan, 0.2], [torch.nan, torch.nan]]).log()
    weights = divergence.importance_weights(log_pf, behaviour, limit=4.0)
    torch.testing.assert_close(weights, torch.tensor([0.5, 3.0, 4.0, 0.0, 0.0]))
    assert not weights.requires_grad
    assert divergence.importance_weights(log_pf, behaviour, limit=1.0).tolist() == [0.5, 1, 1, 0, 0]


def test_importance_weights_do_not_overflow():
    log_pf, behaviour = torch.tensor([[0.0], [-500.0]]), torch.tensor([[-500.0], [0.0]])
    assert divergence.importance_weights(log_pf, behaviour, limit=2.0).tolist() == [2, 0]


@quick
@given(st.integers(1, 6), st.floats(0, 0.8), seeds)
def test_leave_one_out_is_the_weighted_mean_of_the_others(size: int, zeros: float, seed: int):
    rng = np.random.default_rng(seed)
    values, weights = 10 * rng.normal(size=size), rng.uniform(0.1, 2, size=size) * (rng.uniform(size=size) > zeros)
    found = divergence.leave_one_out(torch.from_numpy(values), torch.from_numpy(weights)).numpy()
    for i in range(size):
        others = [j for j in range(size) if j != i and weights[j] > 0]
        expected = np.average(values[others], weights=weights[others]) if others else 0.0
        assert found[i] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("behaviour", ["policy", "uniform"])
@pytest.mark.parametrize("backward", ["posterior", "learned"])
def test_leave_one_out_keeps_the_gradient_exact(backward: str, behaviour: str):
    """The expectation over all pairs of trajectories, as a batch of two is drawn."""
    parameters = logits, head = SMALL.parameters(3)
    log_behaviour = SMALL.log_pf(logits if behaviour == "policy" else torch.zeros_like(logits)).detach()
    drawn = (log_behaviour.sum(1) + SMALL.log_noise).exp()
    weights = divergence.importance_weights(SMALL.log_pf(logits), log_behaviour, limit=1e6)
    ratios, total = SMALL.log_ratio(logits, head, backward), torch.zeros((), **FLOAT64)
    for pair in product(range(len(SMALL.batch)), repeat=2):
        rows = list(pair)
        baseline = divergence.leave_one_out(ratios[rows], weights[rows])
        total = total + drawn[rows].prod() * SMALL.surrogate(logits, head, backward, weights[rows], baseline, rows)
    assert_same_gradients(total, SMALL.divergence(logits, head, backward), parameters)


def small_step(config: ObjectiveConfig, logits: Tensor, head: Tensor, rows: list[int]) -> StepLogProbs:
    """Trajectories of `SMALL` as an objective reads them, drawn by the policy itself; log F does not matter."""
    log_reward = SMALL.log_reward[rows]
    return StepLogProbs(
        config=config,
        mask=SMALL.mask[rows],
        num_steps=torch.full((len(rows),), 2),
        tokens=SMALL.tokens[rows],
        actions=SMALL.actions[rows],
        log_flow=torch.stack([torch.zeros_like(log_reward), torch.ones_like(log_reward), log_reward], 1),
        log_policy=SMALL.log_policy(logits)[rows],
        log_dynamics=SMALL.log_dynamics[rows],
        backward_logits=SMALL.backward_logits(head)[rows] if config.uses_backward_head else None,
        lookahead_logits=None,
        log_behaviour=SMALL.log_pf(logits)[rows].detach(),
        log_reward=log_reward,
    )


@pytest.mark.parametrize("backward", ["posterior", "learned"])
def test_the_divergence_term_is_the_divergence_less_the_log_entropy_ratio(backward: str):
    """In expectation over all pairs, for the loss as the learner takes it."""
    parameters = logits, head = SMALL.parameters(4)
    options = {
        "name": "sgfn_kl",
        "backward": backward,
        "backward_support": 1e-9,
        "exploration_weight": 0.0,
        "gamma": 0.3,
    }
    drawn, total = SMALL.probabilities(logits).detach(), torch.zeros((), **FLOAT64)
    for pair in product(range(len(SMALL.batch)), repeat=2):
        with_term, without = [
            objective_loss(small_step(ObjectiveConfig(**options, kl_weight=weight), logits, head, list(pair)))[0]
            for weight in (1.0, 0.0)
        ]
        total = total + drawn[list(pair)].prod() * (with_term - without)
    entropies = entropy.normalised_entropy(SMALL.log_policy(logits))
    ratio = entropy.entropy_ratio(entropies, SMALL.mask, gamma=0.3, quantile=0.75).ratio[:, 0]
    expected = SMALL.divergence(logits, head, backward) - (drawn * ratio.log()).sum()
    assert_same_gradients(total, expected, parameters)


def test_perfect_flows_have_no_gradient_of_the_divergence():
    """Not in expectation only: log P_F - log P_B - log R is one number, so each trajectory's part vanishes."""
    space = variable_space(2, 3, 1)
    toy = perfect_toy(space, UniformSubstitution(0.25).kernel(space.allowed))
    step = toy.step(ObjectiveConfig())
    log_ratio = step.log_ratio.sum(1) - step.log_reward
    torch.testing.assert_close(log_ratio, torch.full_like(log_ratio, -1.7))


# --- divergence from the posterior ------------------------------------------------------------------------------------


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """log π [B, T, A] with impossible actions, log P(x|a) [B, T, A], and a mask."""
    batch, num_steps, actions = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 5))
    rng, scale = np.random.default_rng(draw(seeds)), draw(st.floats(0.1, 10))
    possible = rng.uniform(size=actions) > draw(st.floats(0, 0.8))
    possible[rng.integers(actions)] = True
    with np.errstate(divide="ignore"):
        log_policy = np.log(random_rows(rng, possible, batch * num_steps).reshape(batch, num_steps, actions))
    log_dynamics = -scale * rng.exponential(size=log_policy.shape)
    mask = balance.step_mask(torch.from_numpy(rng.integers(1, num_steps + 1, size=batch)), num_steps)
    return torch.from_numpy(log_policy), torch.from_numpy(log_dynamics), mask


@quick
@given(steps())
def test_posterior_kl_is_that_of_each_state(step: tuple[Tensor, Tensor, Tensor]):
    log_policy, log_dynamics, mask = step
    value = float(divergence.posterior_kl(log_policy, log_dynamics, mask))
    pairs = zip(log_policy[mask].exp().numpy(), log_dynamics[mask].exp().numpy(), strict=True)
    assert value == pytest.approx(np.mean([reference.posterior_kl(*pair) for pair in pairs]), abs=1e-9)
    assert value >= -1e-12
    silent = log_dynamics[..., :1].expand_as(log_dynamics)  # the outcome is as likely under every intention
    assert abs(float(divergence.posterior_kl(log_policy, silent, mask))) < 1e-12


def test_posterior_kl_of_a_certain_policy_is_zero():
    log_policy = torch.tensor([[[0.0, -torch.inf, -torch.inf], [0.0, -500.0, -500.0]]])
    log_dynamics = torch.tensor([0.9, 0.01, 0.09]).log().expand(1, 2, 3)
    assert float(divergence.posterior_kl(log_policy, log_dynamics, torch.ones(1, 2, dtype=torch.bool))) == 0


def expected_posterior_kl(logits: Tensor, kernel: Tensor) -> Tensor:
    """Over the outcomes of one state, whose law is that of the present policy, not differentiated: as a batch gives it."""
    log_policy, log_dynamics = logits.log_softmax(-1), kernel.T.log()
    outcomes = (logits.detach().softmax(-1) @ kernel)[:, None, None]
    every = [
        divergence.posterior_kl(log_policy[None, None], row[None, None], torch.ones(1, 1) > 0) for row in log_dynamics
    ]
    return (outcomes * torch.stack(every)[:, None, None]).sum()


@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.75])
@pytest.mark.parametrize("num_tokens", [2, 4])
def test_posterior_kl_pulls_away_from_the_uniform_policy(num_tokens: int, alpha: float):
    """An outcome says nothing of an intention that is certain beforehand, and most of one that could be any."""
    kernel = (1 - alpha) * torch.eye(num_tokens, **FLOAT64) + alpha / num_tokens
    uniform = torch.zeros(num_tokens, **FLOAT64).requires_grad_()
    largest = expected_posterior_kl(uniform, kernel)
    assert torch.autograd.grad(largest, uniform)[0].abs().max() < 1e-12
    for odds in (0.1, 1.0, 4.0):
        logits = torch.zeros(num_tokens, **FLOAT64)
        logits[0] = odds
        value = expected_posterior_kl(logits.requires_grad_(), kernel)
        assert value < largest
        (gradient,) = torch.autograd.grad(value, logits)
        assert gradient[0] < 0  # descent makes the favourite more likely still
        assert (gradient[1:] > 0).all()


# --- entropies --------------------------------------------------------------------------------------------------------


@quick
@given(steps())
def test_entropies_equal_their_definition_and_bounds(step: tuple[Tensor, Tensor, Tensor]):
    log_policy, _, _ = step
    laws = log_policy.exp().flatten(0, 1).numpy()
    nats = entropy.policy_entropy(log_policy).flatten().numpy()
    shares = entropy.normalised_entropy(log_policy).flatten().numpy()
    np.testing.assert_allclose(nats, [reference.entropy(law) for law in laws], atol=1e-12)
    np.testing.assert_allclose(shares, [reference.normalised_entropy(law) for law in laws], atol=1e-6)
    assert (shares >= 0).all()
    assert (shares <= 1).all()


def test_entropies_of_uniform_certain_and_forced_choices():
    logits = torch.tensor(
        [[[0.0, 0.0, -torch.inf], [3.0, 3.0, 3.0], [0.0, -torch.inf, -torch.inf], [0.0, -800.0, -800.0]]]
    )
    logits.requires_grad_()
    shares = entropy.normalised_entropy(logits.log_softmax(-1))
    torch.testing.assert_close(shares, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    assert torch.isfinite(torch.autograd.grad(shares.sum(), logits)[0]).all()


@quick
@given(st.integers(1, 4), st.integers(1, 9), st.floats(0, 1), seeds)
def test_masked_quantile_is_the_quantile_of_each_row(batch: int, num_steps: int, q: float, seed: int):
    rng = np.random.default_rng(seed)
    values, mask = rng.uniform(size=(batch, num_steps)), rng.uniform(size=(batch, num_steps)) < 0.6
    mask[:, rng.integers(num_steps)] = True
    found = entropy.masked_quantile(torch.from_numpy(values), torch.from_numpy(mask), q)
    assert found.shape == (batch, 1)
    expected = [np.quantile(row[held], q) for row, held in zip(values, mask, strict=True)]
    np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=1e-5)


entropies = st.lists(
    st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-30, 1, allow_subnormal=False)), min_size=1, max_size=6
)


@quick
@given(entropies, gammas, quantiles, st.sampled_from([torch.float32, torch.float64]))
def test_bounds_of_the_entropy_ratio(values: list[float], gamma: float, quantile: float, dtype: torch.dtype):
    row = torch.tensor([values], dtype=dtype, requires_grad=True)
    mask, margin = torch.ones_like(row, dtype=torch.bool), 1e-5
    found = entropy.entropy_ratio(row, mask, gamma=gamma, quantile=quantile)
    high, low, ratio, share = (float(value.detach()) for value in found)
    expected = reference.entropy_ratio(row[0].detach().numpy().astype(float), gamma, quantile)
    assert low <= high * (1 + margin)
    assert 1 - margin <= ratio <= (1 + margin) / gamma
    assert gamma * (1 - margin) <= share <= 1 + margin
    np.testing.assert_allclose((high, low), expected[:2], atol=1e-5)
    exploration = entropy.exploration_loss(row, found.share, mask, gamma=gamma)
    assert float(exploration.detach()) <= 0
    for value in (found.ratio.log().mean(), exploration, found.share.mean()):
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, row, retain_graph=True)[0]).all()


@pytest.mark.parametrize(
    ("values", "ratio"), [([0.0, 0.0], 1.0), ([0.6, 0.6], 1.0), ([0.0, 0.8], 1 / 0.3), ([0.5], 1.0)]
)
def test_ends_of_the_entropy_ratio(values: list[float], ratio: float):
    """All entropies equal, zero ones too: 1; the low one zero: 1/γ."""
    row = torch.tensor([values])
    found = entropy.entropy_ratio(row, torch.ones_like(row, dtype=torch.bool), gamma=0.3, quantile=1.0)
    assert float(found.ratio) == pytest.approx(ratio)
    assert float(found.share) == pytest.approx(0.3 * ratio)


@quick
@given(entropies, gammas, quantiles)
def test_exploration_equals_its_reference(values: list[float], gamma: float, quantile: float):
    row = torch.tensor([values], **FLOAT64)
    mask = torch.ones_like(row, dtype=torch.bool)
    share = entropy.entropy_ratio(row, mask, gamma=gamma, quantile=quantile).share
    found = entropy.exploration_loss(row, share, mask, gamma=gamma)
    expected = np.mean([reference.exploration_term(h, float(share), gamma) for h in values])
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def entropy_after_a_step(logits: Tensor, share: float, gamma: float, sign: float) -> tuple[float, float]:
    """The entropy of one state's policy before and after a step of `sign` down the gradient of exploration."""
    logits = logits.clone().requires_grad_()
    before = entropy.normalised_entropy(logits.log_softmax(-1)[None, None])
    loss = entropy.exploration_loss(before, torch.tensor([[share]]), torch.ones(1, 1, dtype=torch.bool), gamma=gamma)
    (gradient,) = torch.autograd.grad(sign * loss, logits)
    after = entropy.normalised_entropy((logits - 0.1 * gradient).log_softmax(-1)[None, None])
    return float(before.detach()), float(after.detach())


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("odds", [3.5, 4.5, 6.0])
def test_exploration_raises_the_entropy_of_a_peaked_policy(odds: float, gamma: float):
    """Whatever the share of the high entropy, γ..1. With the opposite sign the term would make it still more certain."""
    logits = torch.tensor([odds, 0.0, 0.0, 0.0])
    for share in (gamma, 0.5 * (gamma + 1), 0.999):
        before, after = entropy_after_a_step(logits, share, gamma, sign=1.0)
        assert before < 0.5
        assert after > before
        before, after = entropy_after_a_step(logits, share, gamma, sign=-1.0)
        assert after < before


def test_exploration_lets_high_entropies_fall_where_low_ones_are_lower_still():
    """∂/∂H = log ρ + (1-γ)(1-2H) log(1-ρ) changes its sign above H = ½ if ρ is near 1."""
    logits = torch.tensor([1.0, 0.0, 0.0, 0.0])
    before, after = entropy_after_a_step(logits, share=0.95, gamma=0.5, sign=1.0)
    assert 0.8 < after < before
    before, after = entropy_after_a_step(logits, share=0.5, gamma=0.5, sign=1.0)
    assert after > before
