"""The memory bank: against a slow reference written like its rules, by generated histories; draws; saved files."""

import json
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.memory_bank import MemoryBank, MemoryBankConfig, SavedBankError
from learner.strands import reverse_complement

SETTINGS = settings(derandomize=True, deadline=None, max_examples=150, database=None)
LENGTH = 4
Sequence = tuple[int, ...]


def make(*, length: int = LENGTH, seed: int = 0, **options: Any) -> MemoryBank:
    return MemoryBank(MemoryBankConfig(**options), length, seed=seed)


def other_strand(sequence: Sequence) -> Sequence:
    return tuple(3 - letter for letter in sequence[::-1])


class SlowBank:
    """The rules one by one: a list of [sequence, reward], oldest first, and exact fractions."""

    def __init__(self, config: MemoryBankConfig):
        self.config, self.members, self.window = config, list[list[Any]](), list[Fraction]()

    def names(self, sequence: Sequence) -> set[Sequence]:
        return {sequence, other_strand(sequence)} if self.config.rc_symmetric else {sequence}

    def threshold(self) -> Fraction | float:
        return sum(self.window) / Fraction(len(self.window)) if self.window else -np.inf

    def add(self, sequence: Sequence, reward: np.float32) -> None:
        if not np.isfinite(reward):
            return
        beats = Fraction(float(reward)) > self.threshold() if self.window else True
        self.window = [*self.window, Fraction(float(reward))][-self.config.window :]
        for member in self.members:
            if member[0] in self.names(sequence):
                member[1] = reward
                return
        if beats:
            self.admit(sequence, reward)

    def admit(self, sequence: Sequence, reward: np.float32) -> None:
        near = [m for m in self.members if self.distance(m[0], sequence) < self.config.niche_distance]
        if any(reward <= member[1] for member in near):
            return
        self.members = [member for member in self.members if member not in near]
        if len(self.members) == self.config.capacity:
            worst = min(self.members, key=lambda member: member[1])
            if reward < worst[1]:
                return
            self.members.remove(worst)
        self.members.append([sequence, reward])

    def distance(self, a: Sequence, b: Sequence) -> int:
        return min(sum(x != y for x, y in zip(a, name, strict=True)) for name in self.names(b))

    def ordered(self) -> list[tuple[Sequence, float]]:
        return [(s, float(r)) for s, r in sorted(self.members, key=lambda member: -member[1])]


def ordered(bank: MemoryBank) -> list[tuple[Sequence, float]]:
    members = bank.all()
    return [(tuple(row), reward) for row, reward in zip(members.tokens.tolist(), members.rewards.tolist(), strict=True)]


configs = st.builds(
    MemoryBankConfig,
    capacity=st.integers(1, 6),
    window=st.integers(1, 5),
    rc_symmetric=st.booleans(),
    niche_distance=st.integers(0, 3),
)
items = st.tuples(
    st.tuples(*[st.integers(0, 3)] * LENGTH), st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0, -1.0, float("nan"), np.inf])
)
histories = st.lists(st.lists(items, max_size=12), max_size=5)


@SETTINGS
@example(MemoryBankConfig(window=3), [[((0, 0, 0, k), 0.1) for k in range(4)]])
@given(configs, histories)
def test_every_history_leads_to_the_members_of_the_slow_bank(config, history):
    bank, slow = MemoryBank(config, LENGTH, seed=0), SlowBank(config)
    for batch in history:
        before = {name for member in slow.members for name in slow.names(member[0])}
        admitted = bank.add(np.array([s for s, _ in batch]).reshape(-1, LENGTH), np.array([r for _, r in batch]))
        for sequence, reward in batch:
            slow.add(sequence, np.float32(reward))
        assert ordered(bank) == slow.ordered()
        assert bank.threshold == pytest.approx(float(slow.threshold()), abs=1e-7)
        assert len(admitted) == len(batch)
        assert {s for s, _ in ordered(bank)} <= before | {s for (s, _), new in zip(batch, admitted, strict=True) if new}


@SETTINGS
@given(configs, histories, st.integers(0, 12))
def test_invariants_and_independence_of_batches(config, history, cut):
    items = [item for batch in history for item in batch]
    whole, parts = (MemoryBank(config, LENGTH, seed=0) for _ in range(2))
    for bank, batches in ((whole, [items]), (parts, [items[:cut], items[cut:]])):
        for batch in batches:
            bank.add(np.array([s for s, _ in batch]).reshape(-1, LENGTH), np.array([r for _, r in batch]))
    assert ordered(whole) == ordered(parts)
    assert whole.statistics() == parts.statistics()
    assert len(whole) <= config.capacity
    members, slow = [s for s, _ in ordered(whole)], SlowBank(config)
    for i, a in enumerate(members):
        for b in members[:i]:
            assert slow.distance(a, b) >= max(1, config.niche_distance)
    drawn = whole.sample(20)
    assert (drawn.rewards > whole.threshold).all()
    assert {tuple(row) for row in drawn.tokens.tolist()} <= set(members)


def test_a_newcomer_is_compared_with_the_past_alone():
    bank = make(window=2)
    rows = np.array([[0, 0, 0, k] for k in range(4)] + [[0, 0, 1, 0]])
    assert bank.add(rows, np.array([0.5, 0.5, 0.6, 0.56, 0.57])).tolist() == [True, False, True, True, False]
    assert bank.threshold == pytest.approx(0.565, abs=1e-6)


def test_the_other_strand_updates_instead_of_joining():
    bank, row = make(), np.array([[0, 0, 1, 2]])
    bank.add(row, np.array([0.5]))
    assert not bank.add(reverse_complement(row), np.array([0.2])).any()
    assert ordered(bank) == [((0, 0, 1, 2), pytest.approx(0.2))]
    separate = make(rc_symmetric=False)
    separate.add(np.concatenate([row, reverse_complement(row)]), np.array([0.5, 0.6]))
    assert len(separate) == 2


def test_the_lowest_reward_is_evicted():
    bank = make(capacity=2, window=1)
    rows = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0], [0, 0, 1, 1]])
    assert bank.add(rows, np.array([0.3, 0.9, 0.1, 0.2, 0.8])).tolist() == [True, True, False, False, True]
    assert [s for s, _ in ordered(bank)] == [(0, 0, 0, 1), (0, 0, 1, 1)]


def test_a_newcomer_within_a_niche_must_be_better_than_all_it_replaces():
    bank = make(niche_distance=2, window=1, rc_symmetric=False)
    bank.add(np.array([[0, 0, 0, 0], [0, 0, 1, 1]]), np.array([0.3, 0.9]))
    assert not bank.add(np.array([[0, 0, 0, 1]] * 2), np.array([0.1, 0.8])).any()
    assert bank.add(np.array([[0, 0, 0, 1]]), np.array([0.95])).all()
    assert [s for s, _ in ordered(bank)] == [(0, 0, 0, 1)]


def test_members_behind_the_threshold_are_kept_but_not_drawn():
    bank = make(window=2)
    bank.add(np.array([[0, 0, 0, 0], [0, 0, 0, 1]]), np.array([0.2, 0.9]))
    bank.add(np.array([[0, 0, 0, 1]] * 2), np.array([0.5, 0.5]))
    assert len(bank.all().rewards) == 2
    assert len(bank.sample(10).rewards) == 0
    bank.add(np.array([[0, 0, 1, 0]] * 2), np.array([0.1, 0.1]))
    assert set(bank.sample(200).rewards.tolist()) == {np.float32(0.2), np.float32(0.5)}


def test_draws_follow_the_softmax():
    bank = make(temperature=0.5, window=1)
    rewards = np.array([0.1, 0.2, 0.6, 1.0])
    bank.add(np.array([[0, 0, 0, k] for k in range(4)]), rewards)
    bank.add(np.array([[0, 0, 0, 0]]), np.array([0.1]))  # window of one: the others beat 0.1
    drawn = bank.sample(20_000)
    weights = np.exp(rewards[1:] / 0.5)
    shares = [(drawn.tokens[:, 3] == k).mean() for k in (1, 2, 3)]
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.016)  # 4.5 standard errors at most
    extreme = make(temperature=1e-3, window=1)
    extreme.add(np.array([[0, 0, 0, k] for k in range(4)]), np.array([-1e4, -1e3, 5.0, 1e4]))
    extreme.add(np.array([[0, 0, 0, 0]]), np.array([-1e4]))
    assert set(extreme.sample(50).rewards.tolist()) == {1e4}


def test_unusable_rewards_are_counted():
    bank = make()
    assert not bank.add(np.zeros((3, LENGTH)), np.array([np.nan, np.inf, -np.inf])).any()
    assert (len(bank), bank.num_invalid, bank.threshold) == (0, 3, -np.inf)
    assert bank.statistics()["bank_num_invalid"] == 3


def filled(seed: int = 0, **options: Any) -> MemoryBank:
    bank, rng = make(**{"capacity": 20, "window": 7, "seed": seed, **options}), np.random.default_rng(1)
    for _ in range(6):
        bank.add(rng.integers(4, size=(15, LENGTH)), rng.random(15))
    bank.sample(3)
    return bank


def contents(bank: MemoryBank) -> tuple:
    drawn = bank.sample(30)
    return ordered(bank), bank.statistics(), drawn.tokens.tolist(), drawn.rewards.tolist()


def test_a_saved_bank_goes_on(tmp_path):
    bank, other = filled(), make(capacity=20, window=7, seed=9)
    bank.save(tmp_path / "b")
    other.load(tmp_path / "b")
    assert contents(other) == contents(bank)
    rng = np.random.default_rng(2)
    rows, rewards = rng.integers(4, size=(40, LENGTH)), rng.random(40)
    np.testing.assert_array_equal(other.add(rows, rewards), bank.add(rows, rewards))
    assert contents(other) == contents(bank)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    make().save(tmp_path / "empty")
    make().load(tmp_path / "empty")


def refused(path: Path, bank: MemoryBank) -> str:
    before = contents(bank)[:2]
    with pytest.raises(SavedBankError) as caught:
        bank.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert contents(bank)[:2] == before
    return str(caught.value)


def test_every_truncation_and_foreign_files_are_noticed(tmp_path):
    path, bank = tmp_path / "b", filled()
    filled().save(path)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert "damaged, cut short or not a saved memory bank" in refused(path, bank)
    path.write_bytes(b"sequence,score\nACG,1\n")
    refused(path, bank)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("state.npy", b"")
    refused(path, bank)
    assert "No such file" in refused(tmp_path / "absent", bank)


def test_flipped_bits_are_refused_or_mean_nothing(tmp_path):
    path, expected = tmp_path / "b", contents(filled())
    filled().save(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        bank = make(capacity=20, window=7)
        try:
            bank.load(path)
        except SavedBankError:
            continue
        assert contents(bank) == expected, place


def test_a_bank_of_other_settings_is_refused_by_name(tmp_path):
    filled().save(tmp_path / "b")
    assert "another capacity" in refused(tmp_path / "b", make(capacity=21, window=7))
    assert "another window, temperature" in refused(tmp_path / "b", make(capacity=20, window=8, temperature=2.0))
    assert "another length of sequences" in refused(tmp_path / "b", make(length=5, capacity=20, window=7))


@pytest.mark.parametrize("change", [{"rewards": np.zeros(3, np.float32)}, {"format_version": 99}])
def test_inconsistent_contents_are_refused(tmp_path, change):
    path = tmp_path / "b"
    filled().save(path)
    with np.load(path) as file:
        saved = {name: file[name] for name in file.files}
    if "format_version" in change:
        saved["state"] = np.array(json.dumps(json.loads(str(saved["state"])) | change))
    else:
        saved |= change
    with open(path, "wb") as file:
        np.savez(file, **saved)
    assert ("format version 99" if "format_version" in change else "unequal size") in refused(
        path, make(capacity=20, window=7)
    )
