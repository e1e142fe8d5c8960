"""Offline sequences: pushed through the noise process, scored, and marked as nobody's choice.

Frequencies are judged by chi-square tests at level 1e-4 with fixed seeds; a new seed raises a false alarm in one of
10,000 tests.
"""

import numpy as np
import pytest
from scipy import stats

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.oracles.table import TableOracle
from actors.rollout import ActorsConfig, RolloutWorker
from learner.networks import MLPConfig
from learner.policy import Policy

FALSE_ALARM = 1e-4


class LengthOracle:
    """The number of tokens; NaN for one length."""

    enumerable, reference = True, None

    def __init__(self, bad_length: int | None = None):
        self.bad_length = bad_length

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.where(lengths == self.bad_length, np.nan, lengths).astype(np.float32)

    def close(self) -> None:
        pass


def make_worker(oracle=None, *, seed: int = 0, **settings) -> RolloutWorker:
    environment = SequenceEnvironment(EnvironmentConfig(**settings))
    policy = Policy(environment.space, MLPConfig(hidden_size=4, num_layers=1, kmer_sizes=()), backward_head=False)
    return RolloutWorker(environment, oracle or LengthOracle(), policy, ActorsConfig(), seed=seed)


def test_offline_trajectories_carry_no_version_and_no_log_prob():
    worker = make_worker(length=3)
    worker.version = 12
    batch, report = worker.rollout_offline(*worker.environment.tokens(["ACG", "TTT"] * 10, origin="o"))
    assert set(batch.policy_version) == {-1} == {report.policy_version}
    assert np.isnan(batch.log_behaviour).all()
    assert batch.num_steps.tolist() == [3] * 20
    assert report.num_sampled == 20
    assert worker.version == 12


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_offline_sequences_pass_through_the_noise(alpha):
    worker, count = make_worker(length=3, noise=alpha), 20_000
    batch, _ = worker.rollout_offline(*worker.environment.tokens(["GAT"] * count, origin="o"))
    np.testing.assert_array_equal(batch.actions, np.tile([2, 0, 3], (count, 1)))
    for step, intended in enumerate([2, 0, 3]):
        seen = np.bincount(batch.tokens[:, step], minlength=4)
        expected = count * ((1 - alpha) * np.eye(4)[intended] + alpha / 4)
        if alpha == 0:
            np.testing.assert_array_equal(seen, expected)
        else:
            assert stats.chisquare(seen, expected).pvalue > FALSE_ALARM


def test_the_score_is_that_of_the_realised_sequence():
    table = np.arange(4**3, dtype=np.float32)
    worker = make_worker(TableOracle(table, 4), length=3, noise=0.8)
    batch, _ = worker.rollout_offline(*worker.environment.tokens(["GAT"] * 500, origin="o"))
    np.testing.assert_array_equal(batch.scores, batch.tokens @ [16, 4, 1])
    assert len(np.unique(batch.scores)) > 10


def test_offline_sequences_of_varying_length_end_where_they_should():
    worker = make_worker(length=4, variable_length=True, min_length=2, noise=0.0)
    batch, _ = worker.rollout_offline(*worker.environment.tokens(["AC", "GTA", "TTTT"], origin="o"))
    assert batch.tokens.tolist() == [[0, 1, 4, 0], [2, 3, 0, 4], [3, 3, 3, 3]]
    np.testing.assert_array_equal(batch.actions, batch.tokens)
    assert batch.num_steps.tolist() == [3, 4, 4]
    assert batch.scores.tolist() == [2, 3, 4]


def test_noise_may_move_the_end_of_an_offline_sequence():
    """With noise α each end is realised with 1-α+α/5; one that is missed is intended again at the next step."""
    worker, count = make_worker(length=4, variable_length=True, min_length=2, noise=0.5), 20_000
    batch, _ = worker.rollout_offline(*worker.environment.tokens(["AC"] * count, origin="o"))
    lengths = worker.environment.lengths(batch.tokens, batch.num_steps)
    ends = 0.6
    law = count * np.array([ends, (1 - ends) * ends, (1 - ends) ** 2])
    assert stats.chisquare(np.bincount(lengths, minlength=5)[2:], law).pvalue > FALSE_ALARM
    taken = np.arange(4) < batch.num_steps[:, None]
    np.testing.assert_array_equal(batch.actions, np.where(taken, [0, 1, 4, 4], 0))


def test_offline_trajectories_without_a_score_are_rejected(caplog):
    worker = make_worker(LengthOracle(bad_length=3), length=4, variable_length=True, min_length=2, noise=0.0)
    batch, report = worker.rollout_offline(*worker.environment.tokens(["AC", "GTA", "TTTT"], origin="o"))
    assert batch.scores.tolist() == [2, 4]
    assert (report.num_sampled, report.num_rejected) == (3, 1)
    assert caplog.messages == ["rejected 1 trajectories with NaN, infinite or negative score: GTA (nan)"]
