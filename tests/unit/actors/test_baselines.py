"""Search baselines: what they draw, keep, ask and count.

Histograms are judged by chi-square tests at level 1e-4 with fixed seeds; a new seed raises a false alarm in one of
10,000 tests.
"""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from actors.baselines import GeneticSearch, MetropolisHastings, SearchBaseline, UniformSearch
from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.oracles.table import TableOracle
from actors.oracles.tfbind8 import TFBind8Config, tfbind8_oracle
from learner.exact_baselines import metropolis_law
from learner.rewards import RewardConfig
from tests.oracles import count_b

FALSE_ALARM = 1e-4
ALL = [UniformSearch, MetropolisHastings, GeneticSearch]
DNA = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=8, noise=1.0))
PAIRS = SequenceEnvironment(EnvironmentConfig(alphabet="ACG", length=2))
ROW = np.asarray([0.5, np.nan, -1.0, 0.2, 0.9, np.inf, 0.0, 0.6, 0.4], np.float32)
"""Scores of the nine pairs AA, AC, AG, CA, ...; AC, AG and CG are invalid, CA and GA have the floor's reward."""
REWARD = RewardConfig(exponent=2, floor=0.3)
"""A floor so high that an invalid score could not be taken for it unnoticed."""


class RecordingOracle:
    """Scores by the number of B and remembers what it was asked."""

    enumerable, reference = True, None

    def __init__(self, environment: SequenceEnvironment):
        self.environment, self.asked, self.answers = environment, [], []

    def score(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.asked.append(tokens.copy())
        strings = [s.decode() for s in self.environment.sequences(tokens, lengths)]
        self.answers.append(np.asarray(count_b(strings), np.float32))
        return self.answers[-1]

    def close(self) -> None: ...


def on_ab(
    kind: type, num_designs: int = 40, *, noise: float = 0.5, **settings
) -> tuple[SearchBaseline, RecordingOracle]:
    environment = SequenceEnvironment(EnvironmentConfig(alphabet="AB", length=6, noise=noise))
    oracle = RecordingOracle(environment)
    return kind(environment, oracle, RewardConfig(), num_designs, np.random.default_rng(1), **settings), oracle


def on_pairs(kind: type, num_designs: int, *, scores: np.ndarray = ROW, seed: int = 0, **settings) -> SearchBaseline:
    return kind(PAIRS, TableOracle(scores, 3), REWARD, num_designs, np.random.default_rng(seed), **settings)


def on_tfbind8(kind: type, num_designs: int) -> SearchBaseline:
    oracle = tfbind8_oracle(TFBind8Config(), DNA)
    return kind(DNA, oracle, RewardConfig(), num_designs, np.random.default_rng(2))


def places(designs: np.ndarray, num_tokens: int) -> np.ndarray:
    return designs.astype(np.int64) @ num_tokens ** np.arange(designs.shape[1] - 1, -1, -1)


def p_value(designs: np.ndarray, law: np.ndarray) -> float:
    """Of the chi-square test that designs of pairs follow `law` [9]."""
    seen, held = np.bincount(places(designs, 3), minlength=9), law > 0
    assert not seen[~held].any()
    return stats.chisquare(seen[held], len(designs) * law[held]).pvalue


# --- what all have in common ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_designs_and_their_scores_belong_together(kind):
    baseline, _ = on_ab(kind)
    for _ in range(5):
        assert baseline.designs.shape == (40, 6)
        assert baseline.designs.dtype == np.int16
        assert baseline.scores.dtype == np.float32
        np.testing.assert_allclose(baseline.scores, (1 + baseline.designs.sum(1)) / 5)
        baseline.step()


@pytest.mark.parametrize("kind", ALL)
def test_every_design_asked_about_counts(kind):
    baseline, oracle = on_ab(kind)
    assert baseline.num_oracle_calls == 40
    for _ in range(4):
        baseline.step()
        assert baseline.num_oracle_calls == sum(len(tokens) for tokens in oracle.asked)
        assert len(oracle.asked[-1]) == 40 - (2 if kind is GeneticSearch else 0)


@pytest.mark.parametrize("kind", ALL)
def test_the_same_seed_gives_the_same_search_whatever_the_noise(kind):
    (one, _), (other, _) = on_ab(kind, noise=0.0), on_ab(kind, noise=1.0)
    for _ in range(6):
        np.testing.assert_array_equal(one.designs, other.designs)
        np.testing.assert_array_equal(one.scores, other.scores)
        one.step()
        other.step()


@pytest.mark.parametrize("kind", ALL)
def test_steps_leave_earlier_arrays_alone(kind):
    baseline, _ = on_ab(kind)
    designs, scores = baseline.designs, baseline.scores
    before = designs.copy(), scores.copy()
    baseline.step()
    np.testing.assert_array_equal(designs, before[0])
    np.testing.assert_array_equal(scores, before[1])


@pytest.mark.parametrize("kind", ALL)
def test_the_start_is_uniform(kind):
    assert p_value(on_pairs(kind, 50_000).designs, np.full(9, 1 / 9)) > FALSE_ALARM


@pytest.mark.parametrize("kind", ALL)
def test_variable_lengths_and_no_design_are_rejected(kind):
    variable = SequenceEnvironment(EnvironmentConfig(alphabet="AB", length=3, variable_length=True))
    with pytest.raises(ValueError, match="fixed length"):
        kind(variable, RecordingOracle(variable), RewardConfig(), 4, np.random.default_rng(0))
    with pytest.raises(ValueError, match="allowed: "):
        on_ab(kind, 0)


def test_uniform_search_draws_anew_at_each_step():
    baseline = on_pairs(UniformSearch, 50_000)
    first = baseline.designs
    baseline.step()
    assert p_value(baseline.designs, np.full(9, 1 / 9)) > FALSE_ALARM
    together = np.bincount(9 * places(first, 3) + places(baseline.designs, 3), minlength=81)
    assert stats.chisquare(together).pvalue > FALSE_ALARM


# --- Metropolis–Hastings ----------------------------------------------------------------------------------------------


def pair_log_rewards() -> np.ndarray:
    """log R of the nine pairs: (max(score, 0.3))², none where the score is invalid."""
    return np.asarray([2 * np.log(max(s, 0.3)) if np.isfinite(s) and s >= 0 else -np.inf for s in ROW.tolist()])


@pytest.mark.parametrize("num_steps", [1, 2, 5, 60])
def test_chains_follow_their_exact_law(num_steps):
    baseline = on_pairs(MetropolisHastings, 50_000, seed=num_steps)
    for _ in range(num_steps):
        baseline.step()
    assert p_value(baseline.designs, metropolis_law(PAIRS.space, pair_log_rewards(), num_steps)) > FALSE_ALARM


def test_a_proposal_changes_one_position_to_any_other_token():
    environment = SequenceEnvironment(EnvironmentConfig(alphabet="ABC", length=3))
    oracle = RecordingOracle(environment)
    baseline = MetropolisHastings(environment, oracle, RewardConfig(), 60_000, np.random.default_rng(3))
    designs = baseline.designs
    baseline.step()
    changed = oracle.asked[1] != designs
    assert (changed.sum(1) == 1).all()
    moves = 9 * changed.argmax(1) + 3 * designs[changed] + oracle.asked[1][changed]
    seen = np.bincount(moves, minlength=27).reshape(3, 3, 3)
    assert not seen[:, np.arange(3), np.arange(3)].any()
    assert stats.chisquare(seen[:, ~np.eye(3, dtype=bool)].ravel()).pvalue > FALSE_ALARM


def test_an_improvement_is_always_accepted_and_a_loss_sometimes():
    baseline, oracle = on_ab(MetropolisHastings, 1000)
    scores = baseline.scores
    baseline.step()
    proposed, kept = oracle.answers[1], baseline.scores == oracle.answers[1]
    assert kept[proposed > scores].all()
    assert 0 < kept[proposed < scores].mean() < 1


def test_chains_leave_invalid_scores_and_never_return():
    baseline = on_pairs(MetropolisHastings, 2000)
    valid = np.isfinite(baseline.scores) & (baseline.scores >= 0)
    assert 0 < valid.mean() < 1
    for _ in range(40):
        baseline.step()
        now = np.isfinite(baseline.scores) & (baseline.scores >= 0)
        assert now[valid].all()
        valid = now
    assert valid.all()


def test_chains_wander_where_every_score_is_invalid():
    baseline = on_pairs(MetropolisHastings, 50_000, scores=np.full(9, np.nan, np.float32))
    before = baseline.designs
    baseline.step()
    assert (baseline.designs != before).any(1).all()
    assert p_value(baseline.designs, np.full(9, 1 / 9)) > FALSE_ALARM


# --- genetic algorithm ------------------------------------------------------------------------------------------------


def test_evolution_beats_uniform_search_on_tfbind8_and_never_loses_its_best():
    evolved, uniform = on_tfbind8(GeneticSearch, 200), on_tfbind8(UniformSearch, 200)
    for _ in range(20):
        best = evolved.scores.max()
        evolved.step()
        assert evolved.scores.max() >= best
        uniform.step()
    assert evolved.num_oracle_calls == 200 + 20 * 190
    assert evolved.scores.mean() > uniform.scores.mean() + 0.1
    assert evolved.scores.max() > 0.95


def test_the_best_distinct_designs_survive():
    baseline, _ = on_ab(GeneticSearch, 60, num_survivors=8)
    for _ in range(5):
        distinct, first = np.unique(baseline.designs, axis=0, return_index=True)
        expected = np.sort(baseline.scores[first])[::-1][:8]
        baseline.step()
        assert len(distinct) >= 8
        np.testing.assert_array_equal(baseline.scores[:8], expected)
        assert len(np.unique(baseline.designs[:8], axis=0)) == 8


def test_survivors_are_fewer_where_there_are_no_more_distinct_designs():
    baseline = on_pairs(GeneticSearch, 200, num_survivors=50)
    baseline.step()
    assert baseline.num_oracle_calls == 200 + 191
    np.testing.assert_allclose(baseline.scores[:6], [0.9, 0.6, 0.5, 0.4, 0.2, 0.0])


def test_invalid_designs_have_no_child_where_others_compete():
    """Without mutation, and with a tournament that all but surely meets every design, only the best pair has any."""
    baseline = on_pairs(GeneticSearch, 100, num_survivors=0, tournament_size=5000, mutation_rate=0.0)
    baseline.step()
    np.testing.assert_array_equal(baseline.scores, np.full(100, 0.9, np.float32))


def test_children_without_mutation_join_pieces_of_two_parents():
    """Parents of zeros or ones, and the second one's part between two cuts of seven each: all pieces by their odds."""
    baseline, _ = on_ab(GeneticSearch, 40_000, num_survivors=0, tournament_size=1, mutation_rate=0.0)
    baseline.designs = np.arange(40_000)[:, None] % 2 * np.ones(6, np.int16)
    expected = np.zeros(2**6)
    for first, second, one, other in product("01", "01", range(7), range(7)):
        i, j = sorted((one, other))
        expected[int(first * i + second * (j - i) + first * (6 - j), 2)] += 40_000 / (4 * 49)
    baseline.step()
    seen, possible = np.bincount(places(baseline.designs, 2), minlength=2**6), expected > 0
    assert not seen[~possible].any()
    assert stats.chisquare(seen[possible], expected[possible]).pvalue > FALSE_ALARM


def test_mutations_come_at_their_rate_and_give_every_other_token():
    environment = SequenceEnvironment(EnvironmentConfig(alphabet="ABC", length=4))
    oracle = RecordingOracle(environment)
    baseline = GeneticSearch(environment, oracle, RewardConfig(), 30_000, np.random.default_rng(4), num_survivors=0)
    baseline.designs = np.ones((30_000, 4), np.int16)
    baseline.step()
    for position in range(4):
        seen = np.bincount(oracle.asked[1][:, position], minlength=3)
        assert stats.chisquare(seen, 30_000 * np.asarray([1 / 8, 3 / 4, 1 / 8])).pvalue > FALSE_ALARM


def test_evolution_goes_on_where_every_score_is_invalid():
    baseline = on_pairs(GeneticSearch, 20, scores=np.full(9, np.nan, np.float32))
    for _ in range(3):
        baseline.step()
    assert np.isnan(baseline.scores).all()


@pytest.mark.parametrize(
    "settings",
    [{"num_survivors": 40}, {"num_survivors": -1}, {"tournament_size": 0}, {"mutation_rate": 1.5}],
    ids=str,
)
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: got"):
        on_ab(GeneticSearch, 40, **settings)
