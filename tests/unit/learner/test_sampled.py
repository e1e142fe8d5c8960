"""Distances from samples of known probability: probabilities by brute force, estimates against exact figures.

Statistical tests have fixed seeds; each says how often a new seed would raise a false alarm.
"""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actors.environments.noise import UniformSubstitution
from actors.trajectories import TrajectoryBatch, empty_batch
from learner import exact, sampled
from learner.networks import MLPConfig, NetworkConfig, TransformerConfig
from learner.policy import Policy
from learner.space import SequenceSpace
from tests.reference import (
    draw_paths,
    fixed_space,
    random_kernel,
    random_policies,
    random_rows,
    randomise,
    sequence_of,
    variable_space,
)

SPACES = [fixed_space(3, 3), variable_space(2, 3, 0), variable_space(2, 4, 2)]
SMALL_SPACES = [fixed_space(2, 3), variable_space(2, 2, 0), variable_space(2, 3, 1)]
MLP = MLPConfig(hidden_size=6, num_layers=2)
TRANSFORMER = TransformerConfig(name="transformer", hidden_size=8, num_heads=2, num_layers=1)
THOUGHTS = TransformerConfig(name="transformer", hidden_size=8, num_heads=2, num_layers=1, thought_context=True)
ESTIMATES = ["sampled_tv", "sampled_reverse_kl", "log_z_estimate", "target_mean_score_estimate"]


def uniform_noise(space: SequenceSpace, alpha: float) -> np.ndarray:
    return UniformSubstitution(alpha).kernel(space.allowed)


def random_policy(space: SequenceSpace, config: NetworkConfig, seed: int = 1, scale: float = 0.4) -> Policy:
    policy = Policy(space, config)
    randomise(policy, seed=seed, scale=scale)
    return policy


def trajectories_of(space: SequenceSpace) -> TrajectoryBatch:
    """One trajectory of each finished sequence, in the order of the space; intentions are nonsense."""
    tokens, lengths = space.enumerate()
    batch = empty_batch(space.max_length, len(tokens))
    batch.tokens[:], batch.num_steps[:] = tokens, lengths
    for b, length in enumerate(lengths):
        if length < space.max_length:
            batch.tokens[b, length] = space.end
            batch.num_steps[b] += 1
    batch.actions[:] = np.random.default_rng(0).integers(space.num_actions, size=tokens.shape)
    return batch


class TablePolicy:
    """A random float64 π(a | prefix, thoughts), as `log_probabilities` reads a policy; no network is involved."""

    def __init__(self, space: SequenceSpace, seed: int, *, thought_context: bool):
        self.space, self.thought_context, self._rng = space, thought_context, np.random.default_rng(seed)
        self._rows: dict[tuple[int, ...], np.ndarray] = {}

    def row(self, string: tuple[int, ...]) -> np.ndarray:
        """π of a string of symbols."""
        if string not in self._rows:
            self._rows[string] = random_rows(self._rng, self.space.allowed[len(string)], 1)[0]
        return self._rows[string]

    def at(self, tokens: tuple[int, ...], actions: tuple[int, ...]) -> np.ndarray:
        """π after realised `tokens` and intended `actions`."""
        if not self.thought_context:
            return self.row(tokens)
        return self.row(tuple(x * self.space.num_actions + a for x, a in zip(tokens, actions, strict=True)))

    def __call__(self, symbols: torch.Tensor, rows: torch.Tensor) -> SimpleNamespace:
        width = symbols.shape[1] + 1
        strings = [tuple(symbols[row // width, : row % width].tolist()) for row in rows.tolist()]
        with np.errstate(divide="ignore"):
            return SimpleNamespace(log_policy=torch.from_numpy(np.log(np.stack([self.row(s) for s in strings]))))


def joint_law(
    policy: TablePolicy, kernel: np.ndarray
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], float, float]]:
    """(tokens, actions, joint probability, Π_t Σ_a π(a|s_t,h_t) K_t(x_t|a)) of every trajectory that can happen."""
    space = policy.space

    def walk(tokens: tuple[int, ...], actions: tuple[int, ...], joint: float, product: float) -> Iterator:
        t = len(tokens)
        if t == space.max_length or (space.variable_length and t and tokens[-1] == space.end):
            yield tokens, actions, joint, product
            return
        row = policy.at(tokens, actions)
        for action, token in itertools.product(range(space.num_actions), repeat=2):
            probability = row[action] * kernel[t, action, token]
            if probability > 0:
                total = sum(row[a] * kernel[t, a, token] for a in range(space.num_actions))
                yield from walk((*tokens, token), (*actions, action), joint * probability, product * total)

    return walk((), (), 1.0, 1.0)


def joint_batch(policy: TablePolicy, kernel: np.ndarray) -> tuple[TrajectoryBatch, np.ndarray, np.ndarray]:
    listed = list(joint_law(policy, kernel))
    batch = empty_batch(policy.space.max_length, len(listed))
    for b, (tokens, actions, _, _) in enumerate(listed):
        batch.tokens[b, : len(tokens)], batch.actions[b, : len(tokens)] = tokens, actions
        batch.num_steps[b] = len(tokens)
    return batch, np.array([item[2] for item in listed]), np.array([item[3] for item in listed])


# --- probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, None])
@pytest.mark.parametrize("config", [MLP, TRANSFORMER], ids=["mlp", "transformer"])
def test_log_probabilities_are_those_of_the_exact_law(
    space: SequenceSpace, alpha: float | None, config: NetworkConfig, monkeypatch: pytest.MonkeyPatch
):
    kernel = random_kernel(space, np.random.default_rng(3)) if alpha is None else uniform_noise(space, alpha)
    policy, batch = random_policy(space, config), trajectories_of(space)
    law, _ = exact.realised_law(space, exact.policy_tables(policy), kernel)
    for chunk in (5, 256):
        monkeypatch.setattr(sampled, "CHUNK", chunk)
        found = sampled.log_probabilities(policy, batch, kernel)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, np.log(law), rtol=1e-4, atol=1e-4)
        assert np.exp(found).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("space", SMALL_SPACES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.25])
@torch.no_grad()
def test_log_probabilities_with_thoughts_are_the_naive_products(space: SequenceSpace, alpha: float):
    kernel, policy = uniform_noise(space, alpha), random_policy(space, THOUGHTS)
    assert policy.thought_context
    batch = draw_paths(space, kernel, 30, seed=4)
    expected = []
    for b in range(len(batch)):
        total = 0.0
        for t in range(batch.num_steps[b]):
            state = policy.start()
            for token, action in zip(batch.tokens[b, :t], batch.actions[b, :t], strict=True):
                symbol = torch.tensor([int(token) * space.num_actions + int(action)])
                state = policy.extend(state, torch.zeros(1, dtype=torch.int64), symbol)
            probabilities = policy.at(state).log_policy[0].exp().double().numpy()
            total += np.log(sum(p * kernel[t, a, batch.tokens[b, t]] for a, p in enumerate(probabilities)))
        expected.append(total)
    np.testing.assert_allclose(sampled.log_probabilities(policy, batch, kernel), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", SMALL_SPACES, ids=str)
@pytest.mark.parametrize("thought_context", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.25, None])
def test_log_probabilities_of_every_trajectory(space: SequenceSpace, thought_context: bool, alpha: float | None):
    """In float64: the product over steps, whatever the intention of the last step was."""
    kernel = random_kernel(space, np.random.default_rng(5)) if alpha is None else uniform_noise(space, alpha)
    policy = TablePolicy(space, 6, thought_context=thought_context)
    batch, joint, products = joint_batch(policy, kernel)
    assert joint.sum() == pytest.approx(1, abs=1e-12)
    found = sampled.log_probabilities(policy, batch, kernel)
    np.testing.assert_allclose(found, np.log(products), rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", SMALL_SPACES, ids=str)
@pytest.mark.parametrize("thought_context", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_the_mean_weight_is_z(space: SequenceSpace, thought_context: bool, alpha: float):
    """No sampling: the expectation over every trajectory. So also for thoughts, given which x has its probability."""
    kernel, policy = uniform_noise(space, alpha), TablePolicy(space, 7, thought_context=thought_context)
    batch, joint, _ = joint_batch(policy, kernel)
    sequences = [tuple(row[:length].tolist()) for row, length in zip(*space.enumerate(), strict=True)]
    rewards = np.random.default_rng(8).exponential(size=len(sequences))
    reward_of = dict(zip(sequences, rewards.tolist(), strict=True))
    reward = np.array([reward_of[sequence_of(space, batch, b)] for b in range(len(batch))])
    weights = np.exp(np.log(reward) - sampled.log_probabilities(policy, batch, kernel))
    z = sum(reward_of.values())
    assert joint @ weights == pytest.approx(z, rel=1e-10)
    law, target = dict.fromkeys(sequences, 0.0), {s: r / z for s, r in reward_of.items()}
    for b, probability in enumerate(joint):
        law[sequence_of(space, batch, b)] += probability
    tv = 0.5 * sum(abs(law[s] - target[s]) for s in sequences)
    kl = sum(law[s] * np.log(law[s] / target[s]) for s in sequences)
    estimated_tv, estimated_kl = 0.5 * joint @ abs(weights / z - 1), np.log(z) - joint @ np.log(weights)
    if thought_context:  # the joint laws: upper bounds
        assert estimated_tv >= tv - 1e-12
        assert estimated_kl >= kl - 1e-12
    else:
        assert estimated_tv == pytest.approx(tv, abs=1e-12)
        assert estimated_kl == pytest.approx(kl, abs=1e-12)


def test_long_sequences_have_finite_log_probabilities():
    space = fixed_space(4, 100)
    kernel = uniform_noise(space, 0.25)
    for config in (MLPConfig(hidden_size=4, num_layers=1), THOUGHTS):
        policy, batch = Policy(space, config), draw_paths(space, kernel, 5, seed=0)
        np.testing.assert_allclose(sampled.log_probabilities(policy, batch, kernel), -100 * np.log(4), rtol=1e-6)


# --- estimates --------------------------------------------------------------------------------------------------------


class Toy:
    """A law and a target on eight sequences, and every distance exactly."""

    def __init__(self, seed: int = 0):
        space, rng = fixed_space(2, 3), np.random.default_rng(seed)
        self.law, _ = exact.realised_law(space, random_policies(space, rng), uniform_noise(space, 0.25))
        self.scores = rng.uniform(0.2, 1, 8)
        self.log_rewards = 3 * np.log(self.scores) + 5
        z = np.exp(self.log_rewards).sum()
        target = np.exp(self.log_rewards) / z
        self.exact = {
            "sampled_tv": 0.5 * np.abs(self.law - target).sum(),
            "sampled_reverse_kl": (self.law * np.log(self.law / target)).sum(),
            "log_z_estimate": np.log(z),
            "target_mean_score_estimate": target @ self.scores,
        }

    def metrics(self, count: int, rng: np.random.Generator) -> dict[str, float]:
        drawn = rng.choice(8, count, p=self.law / self.law.sum())
        return sampled.importance_metrics(np.log(self.law[drawn]), self.log_rewards[drawn], self.scores[drawn], rng)


def test_estimates_converge_to_the_exact_figures(monkeypatch: pytest.MonkeyPatch):
    """Errors of 200,000 samples; the limits are five standard errors or more: a false alarm in 10^6 seeds."""
    monkeypatch.setattr(sampled, "NUM_RESAMPLES", 3)
    toy, rng = Toy(), np.random.default_rng(1)
    metrics = toy.metrics(200_000, rng)
    assert toy.exact["sampled_tv"] > 0.1
    for (name, value), limit in zip(toy.exact.items(), (0.005, 0.015, 0.02, 0.004), strict=True):
        assert metrics[name] == pytest.approx(value, abs=limit), name
    weights = np.exp(toy.log_rewards) / toy.law
    fraction = (toy.law @ weights) ** 2 / (toy.law @ weights**2)
    assert metrics["effective_sample_fraction"] == pytest.approx(fraction, abs=0.01)


def test_intervals_cover_the_exact_figures(monkeypatch: pytest.MonkeyPatch):
    """600 repetitions of 500 samples. Of 4,000 others, each interval covered in 94%; at that rate, the limits are 3.8
    standard errors away, and one of the eight is missed in 1 of 2,000 tests."""
    monkeypatch.setattr(sampled, "NUM_RESAMPLES", 200)
    toy, rng, repetitions = Toy(), np.random.default_rng(2), 600
    covered, widths = dict.fromkeys(ESTIMATES, 0), dict.fromkeys(ESTIMATES, 0.0)
    for _ in range(repetitions):
        metrics = toy.metrics(500, rng)
        for name, value in toy.exact.items():
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            assert low < high
            covered[name] += low <= value <= high
            widths[name] += (high - low) / repetitions
    assert all(0.903 * repetitions < count < 0.977 * repetitions for count in covered.values()), covered
    assert max(widths.values()) < 0.4, widths


def test_the_mean_estimate_of_z_is_z():
    """The mean of 2,000 estimates from 50 samples each, within 4.5 standard errors: a false alarm in 10^5 seeds."""
    toy, rng = Toy(), np.random.default_rng(3)
    drawn = rng.choice(8, (2000, 50), p=toy.law / toy.law.sum())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled, "NUM_RESAMPLES", 2)
        estimates = [
            sampled.importance_metrics(np.log(toy.law[d]), toy.log_rewards[d], toy.scores[d], rng)["log_z_estimate"]
            for d in drawn
        ]
    z = np.exp(estimates)
    assert abs(z.mean() - np.exp(toy.exact["log_z_estimate"])) < 4.5 * z.std() / len(z) ** 0.5


def test_a_perfect_sampler_has_no_distance():
    log_rewards = np.random.default_rng(4).normal(size=300)
    scores = np.linspace(0, 1, 300)
    metrics = sampled.importance_metrics(log_rewards - 7.5, log_rewards, scores, np.random.default_rng(0))
    for name in ("sampled_tv", "sampled_reverse_kl"):
        for end in ("", "_low", "_high"):
            assert metrics[name + end] == pytest.approx(0, abs=1e-12)
    for end in ("", "_low", "_high"):
        assert metrics[f"log_z_estimate{end}"] == pytest.approx(7.5)
    assert metrics["effective_sample_fraction"] == pytest.approx(1)
    assert metrics["target_mean_score_estimate"] == pytest.approx(scores.mean())


def test_the_scale_of_the_reward_moves_log_z_alone():
    rng = np.random.default_rng(5)
    log_p, log_r, scores = rng.normal(size=(3, 200))
    plain, scaled = (
        sampled.importance_metrics(log_p, log_r + shift, scores, np.random.default_rng(0)) for shift in (0.0, 700.0)
    )
    for name, value in plain.items():
        assert scaled[name] == pytest.approx(value + 700 * name.startswith("log_z"), rel=1e-9, abs=1e-9)


def test_equal_numbers_give_equal_intervals():
    toy = Toy()
    assert toy.metrics(100, np.random.default_rng(6)) == toy.metrics(100, np.random.default_rng(6))


def test_intervals_shrink_with_the_root_of_the_number_of_samples():
    """Widths of 16 times as many samples: a quarter, give or take what bootstrapping leaves to chance (1 in 10^4)."""
    toy = Toy()
    few, many = (toy.metrics(count, np.random.default_rng(7)) for count in (250, 4000))
    for name in ESTIMATES:
        ratio = (few[f"{name}_high"] - few[f"{name}_low"]) / (many[f"{name}_high"] - many[f"{name}_low"])
        assert 2.5 < ratio < 6.5, name


EXTREMES = {
    "one in a hundred": np.where(np.arange(100) == 3, 1e4, -1e4),
    "normal": np.random.default_rng(0).normal(size=50) * 5000,
    "two levels": np.where(np.arange(60) % 2, 1e4, -1e4),
    "all low": np.full(40, -1e4),
    "all high": np.full(40, 1e4),
    "one low": np.where(np.arange(40) == 0, -1e4, 0.0),
}


def extreme_metrics(name: str) -> dict[str, float]:
    weights = EXTREMES[name]
    scores = np.random.default_rng(1).random(len(weights))
    return sampled.importance_metrics(-weights / 2, weights / 2, scores, np.random.default_rng(2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", EXTREMES)
def test_estimates_of_extreme_weights_are_finite(name: str):
    metrics = extreme_metrics(name)
    assert all(np.isfinite(metrics[key]) for key in (*ESTIMATES, "effective_sample_fraction")), metrics
    assert 0 <= metrics["sampled_tv"] < 1
    assert metrics["sampled_reverse_kl"] >= -1e-9
    assert 0 < metrics["effective_sample_fraction"] <= 1 + 1e-12


@pytest.mark.parametrize("name", EXTREMES)
def test_intervals_of_extreme_weights_are_finite_and_hold_the_estimate(name: str):
    """Also where some resamples lack the one sample that outweighs all others."""
    metrics = extreme_metrics(name)
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    for key in ESTIMATES:
        assert metrics[f"{key}_low"] <= metrics[key] + 1e-9
        assert metrics[f"{key}_high"] >= metrics[key] - 1e-9


# --- weights and k-mers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXTREMES)
def test_normalised_weights_sum_to_one(name: str):
    weights = sampled.normalised_weights(np.zeros(len(EXTREMES[name])), EXTREMES[name])
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights >= 0).all()
    assert weights.argmax() == EXTREMES[name].argmax()


def test_normalised_weights_are_shares():
    log_p, rewards = np.log([0.5, 0.25, 0.25]), np.array([1.0, 2.0, 0.5])
    found = sampled.normalised_weights(log_p, np.log(rewards).astype(np.float32))
    np.testing.assert_allclose(found, np.array([2, 8, 2]) / 12, rtol=1e-6)


def naive_kmers(sequences: list[tuple[int, ...]], weights: np.ndarray, num_tokens: int, k: int) -> np.ndarray:
    totals = dict.fromkeys(itertools.product(range(num_tokens), repeat=k), 0.0)
    for sequence, weight in zip(sequences, weights, strict=True):
        count = len(sequence) - k + 1
        for start in range(count):
            totals[sequence[start : start + k]] += weight / count
    values = np.array(list(totals.values()))
    return values / values.sum() if values.sum() > 0 else values


@pytest.mark.parametrize("space", [fixed_space(3, 5), variable_space(3, 5, 0), variable_space(2, 4, 1)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_kmers_are_counted_as_by_loops(space: SequenceSpace, k: int):
    """Short sequences count for nothing; a k beyond the longest leaves nothing at all."""
    batch = draw_paths(space, uniform_noise(space, 0.5), 60, seed=9)
    sequences = [sequence_of(space, batch, b) for b in range(len(batch))]
    lengths = np.array([len(sequence) for sequence in sequences], np.int16)
    weights = np.random.default_rng(10).dirichlet(np.full(60, 0.3))
    found = sampled.kmer_frequencies(batch.tokens, lengths, weights, space.num_tokens, k)
    assert found.shape == (space.num_tokens**k,)
    np.testing.assert_allclose(found, naive_kmers(sequences, weights, space.num_tokens, k), atol=1e-12)
    assert found.sum() == pytest.approx(1 if lengths.max() >= k else 0)


def test_kmers_of_no_long_enough_sequence():
    tokens = np.int16([[0, 2, 0], [1, 2, 0]])  # 2 ends
    assert sampled.kmer_frequencies(tokens, np.int16([1, 1]), np.full(2, 0.5), 2, 2).tolist() == [0, 0, 0, 0]
    assert sampled.kmer_frequencies(tokens, np.int16([1, 1]), np.full(2, 0.5), 2, 4).tolist() == [0] * 16
    assert sampled.kmer_frequencies(tokens, np.int16([1, 1]), np.array([0.25, 0.75]), 2, 1).tolist() == [0.25, 0.75]


def test_kmers_of_an_enumerated_law_are_those_of_its_samples():
    """Total variation over 16 two-mers of 50,000 samples: below .02 for all but 1 in 10^6 seeds."""
    space, rng = fixed_space(4, 6), np.random.default_rng(11)
    tokens, lengths = space.enumerate()
    law = rng.dirichlet(np.full(len(tokens), 0.05))
    drawn = rng.choice(len(tokens), 50_000, p=law)
    ours = sampled.kmer_frequencies(tokens[drawn], lengths[drawn], np.full(50_000, 1 / 50_000), 4, 2)
    assert exact.total_variation(ours, sampled.kmer_frequencies(tokens, lengths, law, 4, 2)) < 0.02
