"""Properties of the learner layer on random spaces, networks and laws. Examples are derived, hence always the same."""

from itertools import product

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import exact
from learner.metrics import find_modes, mean_pairwise_hamming
from learner.networks import MLPConfig, build_network
from learner.networks.prefixes import index_prefixes
from learner.objectives import balance
from learner.policy import Policy
from learner.rewards import RewardConfig, log_reward, reward_exponent
from learner.schedules import learning_rate_factor
from learner.space import SequenceSpace
from tests import reference
from tests.reference import (
    assert_water_filling,
    brute_force_law,
    draw_paths,
    fixed_space,
    mlp_outputs,
    random_kernel,
    random_policies,
    random_rows,
    randomise,
    variable_space,
)

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def spaces(draw: st.DrawFn, largest: int = 4) -> SequenceSpace:
    num_tokens, length = draw(st.integers(2, 4)), draw(st.integers(1, largest))
    if draw(st.booleans()):
        return variable_space(num_tokens, length, draw(st.integers(0, length)))
    return fixed_space(num_tokens, length)


def listed(space: SequenceSpace) -> list[tuple[int, ...]]:
    return [tuple(row[:length].tolist()) for row, length in zip(*space.enumerate(), strict=True)]


@quick
@given(spaces())
def test_a_space_lists_all_its_sequences(space: SequenceSpace):
    shortest = space.min_length if space.variable_length else space.max_length
    lengths = range(shortest, space.max_length + 1)
    assert listed(space) == [s for n in lengths for s in product(range(space.num_tokens), repeat=n)]
    assert space.num_sequences == len(listed(space))
    assert abs(space.log_num_completions[0] - np.log(space.num_sequences)) < 1e-5


@quick
@given(spaces(), st.integers(1, 30), st.booleans(), seeds)
def test_prefixes_are_indexed_once_each(space: SequenceSpace, count: int, finished: bool, seed: int):
    batch = draw_paths(space, random_kernel(space, np.random.default_rng(seed)), count, seed)
    rows, inverse = index_prefixes(batch.tokens, batch.num_steps, space.num_actions, finished=finished)
    width = space.max_length + 1
    prefixes = [tuple(batch.tokens[row // width, : row % width].tolist()) for row in rows]
    assert prefixes[0] == ()
    assert len(set(prefixes)) == len(prefixes)
    for b in range(count):
        last = batch.num_steps[b] if finished else batch.num_steps[b] - 1
        found = [prefixes[row] for row in inverse[b]]
        assert found == [tuple(batch.tokens[b, :t].tolist()) if t <= last else () for t in range(width)]


@quick
@given(spaces(), st.lists(st.integers(2, 4), max_size=2), st.integers(1, 3), seeds)
@torch.no_grad()
def test_all_prefixes_equal_steps_and_the_naive_network(
    space: SequenceSpace, kmer_sizes: list[int], num_layers: int, seed: int
):
    config = MLPConfig(hidden_size=5, num_layers=num_layers, kmer_sizes=tuple(kmer_sizes))
    network = build_network(space, 3, config)
    randomise(network, seed)
    batch = draw_paths(space, random_kernel(space, np.random.default_rng(seed)), 4, seed)
    rows, inverse = index_prefixes(batch.tokens, batch.num_steps, space.num_actions, finished=True)
    outputs = network(torch.from_numpy(batch.tokens.astype(np.int64)), torch.from_numpy(rows))[inverse]
    for b in range(len(batch)):
        state = network.start()
        for t in range(batch.num_steps[b] + 1):
            expected = mlp_outputs(network, batch.tokens[b, :t])
            np.testing.assert_allclose(outputs[b, t].numpy(), expected, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(network.outputs(state)[0].numpy(), expected, rtol=1e-3, atol=1e-4)
            if t < batch.num_steps[b]:
                token = torch.tensor([int(batch.tokens[b, t])])
                state = network.extend(state, torch.zeros(1, dtype=torch.int64), token)


@quick
@given(spaces(largest=3), seeds)
def test_the_exact_law_is_a_law_and_that_of_all_paths(space: SequenceSpace, seed: int):
    rng = np.random.default_rng(seed)
    kernel, policies = random_kernel(space, rng), random_policies(space, rng)
    law, _ = exact.realised_law(space, policies, kernel)
    assert abs(law.sum() - 1) < 1e-12
    if space.max_length * np.log(space.num_actions) < np.log(30):  # the walk visits A^2T paths
        expected = brute_force_law(space, policies, kernel)
        np.testing.assert_allclose(law, [expected.get(s, 0.0) for s in listed(space)], atol=1e-12)


@quick
@given(spaces(), seeds)
def test_the_law_of_an_untrained_policy_has_all_sequences(space: SequenceSpace, seed: int):
    policy = Policy(space, MLPConfig(hidden_size=4, num_layers=1), backward_head=False)
    randomise(policy, seed)
    kernel = random_kernel(space, np.random.default_rng(seed))
    law, _ = exact.realised_law(space, exact.policy_tables(policy), kernel)
    assert law.shape == (space.num_sequences,)
    assert (law > 0).all()
    assert abs(law.sum() - 1) < 1e-5


@quick
@given(spaces(), st.floats(-500, 500), st.floats(0, 0.8), seeds)
def test_target_conditionals_multiply_to_the_target(space: SequenceSpace, shift: float, impossible: float, seed: int):
    rng = np.random.default_rng(seed)
    log_rewards = rng.normal(size=space.num_sequences) + shift
    log_rewards[1:][rng.uniform(size=space.num_sequences - 1) < impossible] = -np.inf
    tree = exact.target_tree(space, log_rewards)
    identity = np.broadcast_to(np.eye(space.num_actions), (space.max_length, space.num_actions, space.num_actions))
    law, reach = exact.realised_law(space, tree.conditionals, identity)
    np.testing.assert_allclose(law, tree.law, atol=1e-12)
    np.testing.assert_allclose(tree.law * np.exp(tree.log_z - shift), np.exp(log_rewards - shift), rtol=1e-8)
    for ours, theirs in zip(reach, tree.reach, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@quick
@given(st.integers(2, 6), st.floats(0, 1), st.floats(0, 0.7), st.floats(0.2, 5), seeds)
def test_projection_is_water_filling(num_actions: int, mass: float, zeros: float, peak: float, seed: int):
    rng = np.random.default_rng(seed)
    floor = rng.exponential(size=num_actions) * (rng.uniform(size=num_actions) > zeros)
    floor = mass * floor / max(floor.sum(), 1e-9)
    p = random_rows(rng, np.ones(num_actions, bool), 8) ** peak
    p[1:] *= rng.uniform(size=(7, num_actions)) > zeros
    p = p[p.sum(1) > 0]
    p /= p.sum(1, keepdims=True)
    for target, closest in zip(p, exact.attainable_projection(p, floor), strict=True):
        assert_water_filling(target, closest, floor)


@quick
@given(spaces(largest=3), st.floats(0.05, 1), seeds)
def test_no_policy_beats_the_floor(space: SequenceSpace, alpha: float, seed: int):
    rng = np.random.default_rng(seed)
    uniform = space.allowed / space.allowed.sum(1, keepdims=True)
    kernel = (1 - alpha) * np.eye(space.num_actions) + alpha * uniform[:, None, :]
    kernel = kernel * space.allowed[:, :, None]
    target = exact.target_tree(space, 3 * rng.normal(size=space.num_sequences))
    kl, tv = exact.kl_floor(space, target, exact.replacement_floor(kernel))
    for policies in (random_policies(space, rng), target.conditionals):
        law, _ = exact.realised_law(space, policies, kernel)
        assert kl <= exact.kl_divergence(target.law, law) + 1e-9
    assert kl >= -1e-9
    assert 0 <= tv <= (max(kl, 0) / 2) ** 0.5 + 1e-6  # Pinsker


@quick
@given(st.integers(1, 20), st.floats(0, 0.9), seeds)
def test_divergences_keep_their_bounds(size: int, zeros: float, seed: int):
    rng = np.random.default_rng(seed)
    p, q = rng.exponential(size=(2, size)) * (rng.uniform(size=(2, size)) >= zeros) + 1e-300
    p, q = p / p.sum(), q / q.sum()
    js, tv = exact.jensen_shannon(p, q), exact.total_variation(p, q)
    assert -1e-12 <= js <= np.log(2) + 1e-12
    assert abs(js - exact.jensen_shannon(q, p)) < 1e-12
    assert abs(exact.jensen_shannon(p, p)) < 1e-12
    assert tv**2 / 2 - 1e-12 <= js <= tv * np.log(2) + 1e-12
    assert exact.kl_divergence(p, q) >= 2 * tv**2 - 1e-9


@quick
@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 5), seeds)
def test_posterior_balance_is_marginal_balance(batch: int, steps: int, num_actions: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    log_flow = 3 * torch.randn(batch, steps + 1, **options)
    log_policy = (3 * torch.randn(batch, steps, num_actions, **options)).log_softmax(-1)
    log_dynamics = torch.rand(batch, steps, num_actions, **options).log()  # P(x|s,a) of one outcome: no law over a
    actions = torch.randint(num_actions, (batch, steps), generator=generator)
    mask = balance.step_mask(torch.randint(1, steps + 1, (batch,), generator=generator), steps)
    log_pb = balance.posterior_log_pb(log_policy, log_dynamics, actions)
    assert (log_pb <= 1e-12).all()
    taken = [values.gather(-1, actions[..., None]).squeeze(-1) for values in (log_policy, log_dynamics)]
    residuals = balance.db_residuals(log_flow, sum(taken) - log_pb, mask)
    marginal = log_flow[:, :-1] + (log_policy.exp() * log_dynamics.exp()).sum(-1).log() - log_flow[:, 1:]
    torch.testing.assert_close(residuals, torch.where(mask, marginal, 0.0), rtol=0, atol=1e-9)


@quick
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 3), st.floats(0, 1), seeds)
def test_metrics_equal_the_naive_ones(count: int, length: int, distance: int, cutoff: float, seed: int):
    rng = np.random.default_rng(seed)
    tokens, scores = rng.integers(3, size=(count, length)), np.round(rng.uniform(size=count), 1)
    kept = find_modes(tokens, scores, cutoff=cutoff, distance=distance)
    assert kept.tolist() == reference.modes(tokens, scores, cutoff, distance)
    if count > 1:
        assert abs(mean_pairwise_hamming(tokens) - reference.mean_pairwise_hamming(tokens)) < 1e-9


@quick
@given(st.floats(0.1, 20), st.floats(1, 1e4), st.integers(0, 10**6), seeds)
def test_rewards_keep_the_order_of_scores(exponent: float, ramp: float, step: int, seed: int):
    config = RewardConfig(exponent=exponent, ramp_steps=ramp)
    low, high = sorted((1.0, exponent))
    assert low - 1e-9 <= reward_exponent(config, step) <= high + 1e-9
    scores = torch.from_numpy(np.sort(np.random.default_rng(seed).uniform(0, 2, size=20)))
    rewards = log_reward(scores, config, step=step)
    assert (rewards.diff() >= 0).all()
    assert torch.isfinite(rewards).all()


@quick
@given(st.integers(0, 500), st.integers(1, 300), st.integers(0, 100), st.floats(0.001, 1))
def test_step_sizes_stay_in_their_range(step: int, total: int, warmup: int, final: float):
    factor = learning_rate_factor(step, total, warmup=warmup, final=final)
    assert min(final, 1 / (warmup + 1)) - 1e-12 <= factor <= 1
