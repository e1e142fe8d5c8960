"""The replay buffer: ring, deduplication, sampling, shares, statistics.

Frequencies are judged by chi-square tests at level 1e-4 with fixed seeds; a new seed raises a false alarm in one of
10,000 tests.
"""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from actors.replay_buffer import ReplayBuffer, ReplayConfig, TrajectoryRing
from actors.trajectories import TrajectoryBatch, empty_batch

FALSE_ALARM = 1e-4
OFFLINE = {"offline_source": "lower_half"}


def numbered(count: int, first: int = 0) -> TrajectoryBatch:
    """`count` trajectories that carry their number in every array."""
    batch = empty_batch(3, count)
    for array in batch.arrays().values():
        array[:] = np.arange(first, first + count).reshape(-1, *[1] * (array.ndim - 1))
    return batch


def scored(*scores: float) -> TrajectoryBatch:
    """Numbered trajectories with these scores."""
    batch = numbered(len(scores))
    batch.scores[:] = scores
    return batch


def make_buffer(capacity: int = 8, *, seed: int = 0, **settings) -> ReplayBuffer:
    return ReplayBuffer(ReplayConfig(capacity=capacity, **settings), 3, seed=seed)


def assert_whole(batch: TrajectoryBatch) -> None:
    """Every array of each row carries the row's number."""
    for array in batch.arrays().values():
        np.testing.assert_array_equal(array.reshape(len(batch), -1), np.tile(batch.seed[:, None], array[0].size))


def held(ring: TrajectoryRing) -> list[int]:
    rows = ring.rows(slice(0, len(ring)))
    assert_whole(rows)
    return sorted(rows.seed.tolist())


def test_a_ring_overwrites_the_oldest():
    ring, first = TrajectoryRing(5, 3), 0
    for size in (2, 2, 3, 1, 4, 5):
        ring.add(numbered(size, first))
        first += size
        assert held(ring) == list(range(max(0, first - 5), first))
        assert (len(ring), ring.num_added) == (min(first, 5), first)


@pytest.mark.parametrize("already", [0, 3, 7])
@pytest.mark.parametrize("size", [5, 6, 13])
def test_of_a_batch_larger_than_the_ring_the_last_rows_stay(already, size):
    ring = TrajectoryRing(5, 3)
    ring.add(numbered(already))
    ring.add(numbered(size, already))
    assert held(ring) == list(range(already + size - 5, already + size))
    ring.add(numbered(2, already + size))
    assert held(ring) == list(range(already + size - 3, already + size + 2))


def test_rows_of_a_ring_are_copies():
    ring = TrajectoryRing(4, 3)
    ring.add(numbered(4))
    taken = ring.rows(slice(0, 4))
    ring.add(numbered(4, 10))
    assert taken.seed.tolist() == [0, 1, 2, 3]


def test_a_batch_that_came_before_is_counted_and_not_stored():
    buffer = make_buffer(capacity=20)
    assert buffer.add(numbered(3), "a", 0) == 3
    assert buffer.add(numbered(3), "a", 0) == 0
    assert buffer.add(numbered(2, 3), "a", 1) == 2
    assert buffer.add(numbered(3), "a", 0) == 0
    assert buffer.add(numbered(3, 5), "b", 0) == 3
    assert buffer.add(numbered(1, 8), "a", 7) == 1
    assert (len(buffer), buffer.num_added, buffer.num_duplicates) == (9, 9, 6)
    assert sorted(set(buffer.sample(500).seed.tolist())) == list(range(9))


def test_an_empty_batch_takes_its_number_too():
    buffer = make_buffer()
    assert buffer.add(numbered(0), "a", 0) == 0
    assert buffer.add(numbered(2), "a", 0) == 0
    assert buffer.num_duplicates == 2


def test_sampling_is_uniform_and_takes_whole_rows():
    buffer = make_buffer(capacity=16)
    buffer.add(numbered(40), "a", 0)
    drawn = buffer.sample(20_000)
    assert_whole(drawn)
    assert stats.chisquare(np.bincount(drawn.seed, minlength=40)[24:]).pvalue > FALSE_ALARM
    assert drawn.seed.min() == 24


def test_only_what_is_stored_is_sampled():
    buffer = make_buffer(capacity=1000)
    buffer.add(numbered(3, 1), "a", 0)
    assert set(buffer.sample(300).seed) == {1, 2, 3}
    assert len(buffer.sample(0)) == 0


def test_an_empty_buffer_cannot_be_sampled():
    with pytest.raises(ValueError, match="the replay buffer is empty"):
        make_buffer().sample(1)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 3.0])
def test_prioritised_sampling_follows_the_scores(exponent):
    scores = np.array([0.2, 0.9, 0.0, 0.5, 1.0, 0.7])
    buffer = make_buffer(capacity=6, priority_exponent=exponent)
    buffer.add(scored(*scores), "a", 0)
    seen = np.bincount(buffer.sample(20_000, prioritised=True).seed, minlength=6)
    weights = scores**exponent
    assert seen[2] == 0
    positive = weights > 0
    law = 20_000 * weights[positive] / weights.sum()
    assert stats.chisquare(seen[positive], law).pvalue > FALSE_ALARM
    uniform = np.bincount(buffer.sample(20_000).seed, minlength=6)
    assert stats.chisquare(uniform).pvalue > FALSE_ALARM


def test_remembered_priorities_are_those_of_the_stored_scores(tmp_path: Path):
    """Over additions, evictions, a new largest score, its eviction, and a restart, draw for draw."""
    rng = np.random.default_rng(3)
    buffer = make_buffer(capacity=10, priority_exponent=3.0)
    for number in range(30):
        drawn = rng.random(rng.integers(1, 14)) * (5 if number == 12 else 1)
        batch = scored(*drawn)
        for name in ("tokens", "actions", "contexts"):
            getattr(batch, name)[:] = 0
        batch.num_steps[:] = 3
        buffer.add(batch, "a", number)
        if number % 3 == 0:
            continue  # not every addition is followed by a draw
        if number == 20:
            buffer.save(tmp_path / "buffer.npz")
            buffer = make_buffer(capacity=10, priority_exponent=3.0)
            buffer.load(tmp_path / "buffer.npz")
        buffer.sample(4, prioritised=True)
        scores = buffer._online.arrays["scores"][: len(buffer)].astype(np.float64)
        np.testing.assert_array_equal(buffer._priorities(), (scores / scores.max()) ** 3)


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (np.nextafter(1, 0), 3)])
def test_extreme_random_numbers_never_pick_a_row_without_score(uniform, expected):
    class Constant:
        def random(self, count: int) -> np.ndarray:
            return np.full(count, uniform)

    buffer = make_buffer(priority_exponent=1.0)
    buffer.add(scored(0.0, 0.1, 0.7, 0.3, 0.0), "a", 0)
    buffer._rng = Constant()
    assert buffer.sample(3, prioritised=True).seed.tolist() == [expected] * 3


def test_prioritised_sampling_is_uniform_without_an_exponent_or_without_scores():
    for settings, scores in (({}, [0.1, 0.9, 0.5]), ({"priority_exponent": 2.0}, [0.0, 0.0, 0.0])):
        buffer = make_buffer(capacity=3, **settings)
        buffer.add(scored(*scores), "a", 0)
        seen = np.bincount(buffer.sample(9000, prioritised=True).seed, minlength=3)
        assert stats.chisquare(seen).pvalue > FALSE_ALARM


@pytest.mark.parametrize("scale", [1e-5, 1.0, 4000.0])
def test_priorities_neither_overflow_nor_vanish(scale):
    """Scores need not lie in 0..1, and the exponent may be as large as 100."""
    buffer = make_buffer(capacity=3, priority_exponent=100.0)
    buffer.add(scored(scale, scale / 4, scale), "a", 0)
    seen = np.bincount(buffer.sample(4000, prioritised=True).seed, minlength=3)
    assert seen[1] == 0
    assert stats.chisquare(seen[[0, 2]]).pvalue > FALSE_ALARM


def test_offline_trajectories_are_kept_beside_the_ring_and_never_evicted():
    buffer = make_buffer(capacity=4)
    buffer.set_offline(numbered(10, 100))
    for number in range(5):
        buffer.add(numbered(3, 3 * number), "a", number)
    assert (buffer.num_offline, len(buffer)) == (10, 4)
    assert set(buffer.sample(400).seed) == {11, 12, 13, 14}
    seen = np.bincount(buffer.sample_offline(5000).seed - 100, minlength=10)
    assert stats.chisquare(seen).pvalue > FALSE_ALARM
    buffer.set_offline(numbered(2, 500))
    assert set(buffer.sample_offline(50).seed) == {500, 501}


@pytest.mark.parametrize(
    ("replay", "offline", "expected"),
    [(0.0, 0.0, (0, 0)), (0.5, 0.0, (60, 0)), (0.0, 0.25, (0, 20)), (0.3, 0.2, (36, 24)), (0.1, 0.8, (60, 480))],
)
def test_a_draw_keeps_the_shares_of_the_policys_batch(replay, offline, expected):
    buffer = make_buffer(capacity=50, replay_share=replay, offline_share=offline, **OFFLINE)
    buffer.add(numbered(50), "a", 0)
    buffer.set_offline(numbered(50, 1000))
    drawn = buffer.draw(60, 0)
    assert drawn.dynamics is None
    numbers = [] if drawn.policy is None else drawn.policy.seed
    assert (sum(n < 1000 for n in numbers), sum(n >= 1000 for n in numbers)) == expected
    assert (drawn.policy is None) == (expected == (0, 0))


def test_a_draw_prefers_high_scores_for_the_policy_only():
    buffer = make_buffer(capacity=2, replay_share=0.9, priority_exponent=50.0)
    buffer.add(scored(0.1, 1.0), "a", 0)
    drawn = buffer.draw(100, 1000)
    assert set(drawn.policy.seed) == {1}
    assert stats.chisquare(np.bincount(drawn.dynamics.seed, minlength=2)).pvalue > FALSE_ALARM


def test_the_dynamics_batch_holds_the_offline_share_well_mixed():
    buffer = make_buffer(capacity=50, offline_share=0.25, **OFFLINE)
    buffer.add(numbered(50), "a", 0)
    buffer.set_offline(numbered(50, 1000))
    offline = buffer.draw(60, 400).dynamics.seed >= 1000
    assert (len(offline), offline.sum()) == (400, 100)
    assert 30 <= offline[:200].sum() <= 70  # hypergeometric, standard deviation 4.3: missed once in 400,000


def test_a_draw_from_nothing_gives_nothing():
    buffer = make_buffer(replay_share=0.4, offline_share=0.4, **OFFLINE)
    assert buffer.draw(10, 10) == (None, None, None)
    buffer.set_offline(numbered(3, 1000))
    drawn = buffer.draw(10, 10)
    assert (len(drawn.policy), len(drawn.dynamics)) == (20, 4)
    buffer = make_buffer(replay_share=0.4, offline_share=0.4, **OFFLINE)
    buffer.add(numbered(3), "a", 0)
    drawn = buffer.draw(10, 10)
    assert (len(drawn.policy), len(drawn.dynamics)) == (20, 10)
    assert drawn.policy.seed.max() < 3


def test_the_same_seed_gives_the_same_draws():
    def drawn(seed: int) -> list[int]:
        buffer = make_buffer(seed=seed)
        buffer.add(numbered(8), "a", 0)
        return buffer.sample(100).seed.tolist()

    assert drawn(1) == drawn(1) != drawn(2)


def test_statistics_tell_what_is_stored():
    buffer = make_buffer(capacity=4)
    empty = {"size": 0, "num_added": 0, "num_duplicates": 0, "num_offline": 0, "oldest_version": 0}
    assert buffer.statistics() == {f"buffer_{name}": value for name, value in empty.items()}
    buffer.add(scored(9.0, 9.0, 0.5, 1.0), "a", 0)
    buffer.add(scored(9.0), "a", 0)
    buffer.add(scored(0.0, 2.5), "b", 0)
    buffer.set_offline(numbered(7, 100))
    assert buffer.statistics() == {
        "buffer_size": 4,
        "buffer_num_added": 6,
        "buffer_num_duplicates": 1,
        "buffer_num_offline": 7,
        "buffer_oldest_version": 0,
        "buffer_mean_score": 1.0,
        "buffer_max_score": 2.5,
    }
    buffer.add(numbered(4, 30), "a", 1)
    assert buffer.statistics()["buffer_oldest_version"] == 30


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"capacity": 0}, "capacity"),
        ({"replay_share": 1.0}, "replay_share"),
        ({"replay_share": 0.5, "offline_share": 0.5, **OFFLINE}, "must stay below 1: fresh trajectories are needed"),
        ({"offline_share": 0.2}, "needs an offline_source: lower_half, file or motif_law"),
        ({"offline_source": "file"}, "offline_path goes with offline_source: file"),
        ({"offline_path": "x.csv"}, "offline_path goes with offline_source: file"),
        ({"offline_source": "upper_half"}, "offline_source"),
        ({"priority_exponent": -1}, "priority_exponent"),
        ({"size": 3}, "size"),
    ],
)
def test_config_errors_name_the_key(settings, expected):
    with pytest.raises(ValidationError, match=expected):
        ReplayConfig(**settings)


def test_the_offline_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ReplayConfig(offline_source="file", offline_path="x.csv").offline_path == tmp_path / "x.csv"
