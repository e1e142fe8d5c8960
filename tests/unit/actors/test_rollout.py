"""Rollouts: the law they follow, the log-probs they store, rejected scores, offline sequences, state.

Histograms are judged by chi-square tests at level 1e-4 with fixed seeds; a new seed raises a false alarm in one of
10,000 tests.
"""

import json
import logging

import numpy as np
import pytest
import torch
from scipy import stats

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.rollout import MAX_LOGGED_REJECTIONS, ActorsConfig, RolloutWorker, draw_trajectories
from actors.trajectories import TrajectoryBatch
from learner.exact import policy_tables, realised_law
from learner.flat import FlatParameters
from learner.networks import MLPConfig
from learner.policy import Policy

FALSE_ALARM = 1e-4


class FakeOracle:
    """Scores sequences by a dictionary; others get 1."""

    enumerable, reference = True, None

    def __init__(self, environment: SequenceEnvironment, scores: dict[str, float] | None = None):
        self.environment, self.scores, self.closed = environment, scores or {}, False

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        sequences = self.environment.sequences(tokens, lengths)
        return np.array([self.scores.get(s.decode(), 1.0) for s in sequences], np.float32)

    def close(self) -> None:
        self.closed = True


def make_environment(**settings) -> SequenceEnvironment:
    return SequenceEnvironment(EnvironmentConfig(**({"alphabet": "ACG", "length": 3, "noise": 0.3} | settings)))


def make_policy(environment: SequenceEnvironment, seed: int = 0) -> Policy:
    """A policy far from uniform."""
    torch.manual_seed(seed)
    policy = Policy(environment.space, MLPConfig(hidden_size=16, num_layers=2, kmer_sizes=()), backward_head=False)
    torch.nn.init.normal_(policy.network.head.weight, std=0.8)
    return policy


def make_worker(
    environment: SequenceEnvironment, scores=None, *, seed: int = 5, precision: torch.dtype = torch.float32, **settings
) -> RolloutWorker:
    oracle, config = FakeOracle(environment, scores), ActorsConfig(**settings)
    return RolloutWorker(environment, oracle, make_policy(environment), config, seed=seed, precision=precision)


def histogram(environment: SequenceEnvironment, batch: TrajectoryBatch) -> np.ndarray:
    """Times that each sequence of the space was realised."""
    listed = environment.sequences(*environment.space.enumerate())
    realised = environment.sequences(batch.tokens, environment.lengths(batch.tokens, batch.num_steps))
    order = np.argsort(listed)
    return np.bincount(order[np.searchsorted(listed, realised, sorter=order)], minlength=len(listed))


def p_value(environment: SequenceEnvironment, batch: TrajectoryBatch, law: np.ndarray) -> float:
    """Of the chi-square test that `batch` was drawn from `law`."""
    assert law.sum() == pytest.approx(1)  # policies are float32, chisquare is stricter
    return stats.chisquare(histogram(environment, batch), len(batch) * law / law.sum()).pvalue


def behaviour_tables(policy: Policy, temperature: float, epsilon: float) -> list[np.ndarray]:
    """π^(1/temperature), normalised, mixed with the uniform law on the allowed actions, for every prefix."""
    tables = []
    for step, table in enumerate(policy_tables(policy)):
        allowed = policy.space.allowed[step]
        powers = table ** (1 / temperature)
        tables.append((1 - epsilon) * powers / powers.sum(1, keepdims=True) + epsilon * allowed / allowed.sum())
    return tables


def recomputed_log_probs(policy: Policy, batch: TrajectoryBatch, temperature: float, epsilon: float) -> np.ndarray:
    """log-prob of each intended action, prefix by prefix; 0 beyond the end."""
    tables, result = behaviour_tables(policy, temperature, epsilon), np.zeros(batch.tokens.shape)
    for i in range(len(batch)):
        prefix = 0
        for step in range(batch.num_steps[i]):
            result[i, step] = np.log(tables[step][prefix, batch.actions[i, step]])
            prefix = prefix * policy.space.num_tokens + int(batch.tokens[i, step])
    return result


VARIABLE = {"variable_length": True, "min_length": 1}


@pytest.mark.parametrize(
    ("settings", "temperature", "epsilon"),
    [
        ({}, 1.0, 0.0),
        ({"noise": 0.0}, 1.0, 0.0),
        ({"noise": 1.0}, 1.0, 0.0),
        ({"alphabet": "AC", "length": 4, **VARIABLE}, 1.0, 0.0),
        ({"alphabet": "AC", "length": 3, "noise": 0.0, "variable_length": True, "min_length": 0}, 1.0, 0.0),
        ({}, 2.0, 0.3),
        ({"alphabet": "AC", "length": 4, **VARIABLE}, 0.7, 0.2),
    ],
)
def test_rollouts_follow_the_exact_law(settings, temperature, epsilon):
    environment = make_environment(**settings)
    policy, count = make_policy(environment), 100_000
    batch = draw_trajectories(
        policy,
        environment,
        environment.noise,
        count,
        np.random.default_rng(0),
        temperature=temperature,
        epsilon=epsilon,
    )
    tables = behaviour_tables(policy, temperature, epsilon)
    law, _ = realised_law(environment.space, tables, environment.kernel)
    assert (count * law).min() > 4, "too few expected for a chi-square test"
    assert p_value(environment, batch, law) > FALSE_ALARM


def test_the_test_above_tells_laws_apart():
    environment = make_environment()
    policy = make_policy(environment)
    batch = draw_trajectories(policy, environment, environment.noise, 100_000, np.random.default_rng(0))
    for tables, kernel in (
        (policy_tables(policy), make_environment(noise=0.2).kernel),
        (policy_tables(policy), np.broadcast_to(np.eye(3), (3, 3, 3))),
        (behaviour_tables(policy, 1.3, 0), environment.kernel),
        (behaviour_tables(policy, 1, 0.2), environment.kernel),
    ):
        law, _ = realised_law(environment.space, tables, kernel)
        assert p_value(environment, batch, law) < FALSE_ALARM


def test_noise_switched_off_for_one_call():
    environment = make_environment(noise=1.0)
    policy, rng = make_policy(environment), np.random.default_rng(1)
    batch = draw_trajectories(policy, environment, environment.intact, 100_000, rng)
    law, _ = realised_law(environment.space, policy_tables(policy), np.broadcast_to(np.eye(3), (3, 3, 3)))
    np.testing.assert_array_equal(batch.tokens, batch.actions)
    assert p_value(environment, batch, law) > FALSE_ALARM


@pytest.mark.parametrize("settings", [{}, {"alphabet": "AC", "length": 4, **VARIABLE}])
@pytest.mark.parametrize(("temperature", "epsilon"), [(1.0, 0.0), (0.5, 0.0), (3.0, 0.0), (1.0, 0.4), (2.0, 1.0)])
def test_stored_log_prob_is_that_of_the_behaviour_policy(settings, temperature, epsilon):
    worker = make_worker(make_environment(**settings), batch_size=300, temperature=temperature, epsilon=epsilon)
    batch, _ = worker.rollout()
    expected = recomputed_log_probs(worker.policy, batch, temperature, epsilon)
    np.testing.assert_allclose(batch.log_behaviour, expected, rtol=0, atol=1e-5)
    assert len(batch) == 300
    assert batch.log_behaviour.dtype == np.float32


def test_bfloat16_rollouts_store_their_own_log_probs_near_those_of_float32():
    environment = make_environment()
    half, full = (
        make_worker(environment, precision=precision, batch_size=400).rollout()[0]
        for precision in (torch.bfloat16, torch.float32)
    )
    assert half.log_behaviour.dtype == np.float32
    same = (half.actions == full.actions).all(1) & (half.tokens == full.tokens).all(1)
    assert same.mean() > 0.95  # the same random numbers, so only probabilities near a threshold decide otherwise
    np.testing.assert_allclose(half.log_behaviour[same], full.log_behaviour[same], atol=0.1)
    assert not np.array_equal(half.log_behaviour[same], full.log_behaviour[same])


def test_temperature_and_epsilon_leave_the_policy_alone():
    environment = make_environment()
    worker = make_worker(environment, batch_size=50, temperature=5.0, epsilon=0.5)
    before = policy_tables(worker.policy)
    batch, _ = worker.rollout()
    for left, right in zip(before, policy_tables(worker.policy), strict=True):
        np.testing.assert_array_equal(left, right)
    plain = draw_trajectories(worker.policy, environment, environment.noise, 300, np.random.default_rng(0))
    expected = recomputed_log_probs(worker.policy, plain, 1, 0)
    np.testing.assert_allclose(plain.log_behaviour, expected, atol=1e-5)
    assert np.abs(batch.log_behaviour - recomputed_log_probs(worker.policy, batch, 1, 0)).max() > 0.1


@pytest.mark.parametrize("noise", [0.0, 0.6])
@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_the_end_is_neither_chosen_nor_realised_before_the_minimal_length(noise, epsilon):
    settings = {"alphabet": "AC", "length": 5, "variable_length": True, "min_length": 3, "noise": noise}
    worker = make_worker(make_environment(**settings), batch_size=5000, temperature=50.0, epsilon=epsilon)
    batch, _ = worker.rollout()
    end = worker.environment.space.end
    assert (batch.actions[:, :3] < end).all()
    assert (batch.tokens[:, :3] < end).all()
    assert (batch.actions[:, 3:] == end).any(0).all()
    lengths = worker.environment.lengths(batch.tokens, batch.num_steps)
    assert set(lengths.tolist()) == {3, 4, 5}
    beyond = np.arange(5) >= batch.num_steps[:, None]
    assert beyond.any()
    assert not batch.actions[beyond].any()
    assert not batch.tokens[beyond].any()


def test_a_rollout_says_who_drew_it_and_can_be_drawn_again():
    worker = make_worker(make_environment(), batch_size=40)
    worker.version = 7
    first, report = worker.rollout()
    second, _ = worker.rollout()
    assert set(first.policy_version) == {7} == {report.policy_version}
    assert len(set(first.seed)) == 1
    assert first.seed[0] != second.seed[0]
    again = draw_trajectories(
        worker.policy, worker.environment, worker.environment.noise, 40, np.random.default_rng(first.seed[0])
    )
    np.testing.assert_array_equal(again.tokens, first.tokens)
    np.testing.assert_array_equal(again.actions, first.actions)
    assert np.isnan(again.scores).all()
    assert (report.num_sampled, report.num_rejected) == (40, 0)
    assert report.cpu_seconds > 0
    assert report.rollout_seconds > 0
    assert report.oracle_seconds > 0


def test_workers_of_another_seed_draw_other_trajectories():
    environment = make_environment(length=8)
    left, right = (make_worker(environment, seed=seed, batch_size=100).rollout()[0] for seed in (1, 2))
    assert (left.tokens != right.tokens).any()


def test_new_weights_are_what_is_drawn_from():
    environment = make_environment()
    worker, other = make_worker(environment, batch_size=200), make_policy(environment, seed=9)
    weights = FlatParameters(other).vector.detach().numpy().copy()
    weights.flags.writeable = False
    worker.set_weights(weights, version=3)
    batch, report = worker.rollout()
    assert report.policy_version == 3
    np.testing.assert_allclose(batch.log_behaviour, recomputed_log_probs(other, batch, 1, 0), atol=1e-5)
    assert np.abs(batch.log_behaviour - recomputed_log_probs(make_policy(environment), batch, 1, 0)).max() > 0.1


def test_weights_of_another_network_are_refused():
    worker = make_worker(make_environment())
    with pytest.raises(ValueError, match=r"weights of \(3,\) values do not fit a network of \d+"):
        worker.set_weights(np.zeros(3, np.float32), version=1)
    assert worker.version == 0


def test_saved_state_continues_the_same_draws():
    environment = make_environment()
    worker = make_worker(environment, batch_size=30)
    worker.set_weights(FlatParameters(make_policy(environment)).vector.detach().numpy(), version=4)
    worker.rollout()
    state = json.loads(json.dumps(worker.state_dict()))
    expected = [worker.rollout()[0] for _ in range(2)]
    other = make_worker(environment, batch_size=30, seed=99)
    other.load_state_dict(state)
    assert other.version == 4
    for batch in expected:
        found, _ = other.rollout()
        for name, array in batch.arrays().items():
            np.testing.assert_array_equal(found.arrays()[name], array, err_msg=name)


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf, -1e-6])
def test_bad_scores_are_rejected_counted_and_logged_with_their_sequence(score, caplog):
    worker = make_worker(make_environment(noise=0.0, length=2), {"AC": score, "GG": 0.0}, batch_size=400)
    with caplog.at_level(logging.WARNING, logger="actors.rollout"):
        batch, report = worker.rollout()
    sequences = worker.environment.sequences(batch.tokens, batch.num_steps)
    assert b"AC" not in sequences
    assert b"GG" in sequences
    assert report.num_sampled == 400
    assert report.num_rejected == 400 - len(batch) > MAX_LOGGED_REJECTIONS
    (message,) = caplog.messages
    assert message.startswith(f"rejected {report.num_rejected} trajectories with NaN, infinite or negative score: ")
    assert message.count(f"AC ({score:g})") == MAX_LOGGED_REJECTIONS


def test_a_batch_without_a_good_score_is_empty_and_names_its_version(caplog):
    environment = make_environment(length=1)
    worker = make_worker(environment, dict.fromkeys("ACG", float("nan")), batch_size=3)
    worker.version = 2
    batch, report = worker.rollout()
    assert (len(batch), report.num_rejected, report.policy_version) == (0, 3, 2)
    assert batch.tokens.shape == (0, 1)
    assert caplog.messages[0].startswith("rejected 3 trajectories")


def test_good_scores_are_kept_raw_and_nothing_is_logged(caplog):
    worker = make_worker(make_environment(noise=0.0, length=1), {"A": 0.0, "C": 1e-7, "G": 4e6}, batch_size=60)
    batch, report = worker.rollout()
    expected = np.array([0.0, 1e-7, 4e6], np.float32)[batch.tokens[:, 0]]
    np.testing.assert_array_equal(batch.scores, expected)
    assert report.num_rejected == 0
    assert not caplog.messages
