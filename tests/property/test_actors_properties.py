"""Properties of environments, noise, rollouts, the replay buffer and lookups, on generated cases (always the same)."""

import string
import tempfile
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from actors.environments.noise import UniformSubstitution
from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment, SequenceError
from actors.oracles.base import OracleDataError
from actors.oracles.table import LookupConfig, LookupOracle, TableOracle
from actors.replay_buffer import ReplayBuffer, ReplayConfig
from actors.rollout import draw_trajectories
from actors.trajectories import TrajectoryBatch, empty_batch, mix
from learner.networks import MLPConfig
from learner.policy import Policy

SETTINGS = settings(derandomize=True, deadline=None, max_examples=80, database=None)
LETTERS = "".join(c for c in string.printable if c.isprintable() and c not in " ,>\"'")


@st.composite
def environments(draw, max_letters: int = 8, max_length: int = 6) -> SequenceEnvironment:
    alphabet = "".join(draw(st.lists(st.sampled_from(LETTERS), min_size=2, max_size=max_letters, unique=True)))
    length = draw(st.integers(1, max_length))
    return SequenceEnvironment(
        EnvironmentConfig(
            alphabet=alphabet,
            length=length,
            variable_length=draw(st.booleans()),
            min_length=draw(st.integers(0, length)),
            noise=draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1)),
        )
    )


def strings(environment: SequenceEnvironment, **size) -> st.SearchStrategy[list[str]]:
    space = environment.space
    text = st.text(environment.config.alphabet, min_size=space.min_length, max_size=space.max_length)
    return st.lists(text, **size)


def numbered(count: int, first: int) -> TrajectoryBatch:
    batch = empty_batch(2, count)
    batch.seed[:] = batch.policy_version[:] = np.arange(first, first + count)
    batch.num_steps[:] = 2
    return batch


@SETTINGS
@given(st.data())
def test_encoding_and_decoding_are_inverse(data):
    environment = data.draw(environments())
    sequences = data.draw(strings(environment, max_size=6))
    tokens, lengths = environment.tokens(sequences, origin="o")
    assert [s.decode() for s in environment.sequences(tokens, lengths).tolist()] == sequences
    assert lengths.tolist() == [len(s) for s in sequences]
    assert not tokens[np.arange(environment.space.max_length) >= lengths[:, None]].any()


@SETTINGS
@given(st.data())
def test_a_foreign_character_is_named_wherever_it_stands(data):
    environment = data.draw(environments())
    alphabet = environment.config.alphabet
    sequences = data.draw(strings(environment, min_size=1, max_size=4))
    row = data.draw(st.integers(0, len(sequences) - 1))
    assume(sequences[row])
    column = data.draw(st.integers(0, len(sequences[row]) - 1))
    foreign = data.draw(st.characters(exclude_categories=["Cs"]).filter(lambda c: c not in alphabet))
    sequences[row] = sequences[row][:column] + foreign + sequences[row][column + 1 :]
    with pytest.raises(SequenceError) as caught:
        environment.tokens(sequences, origin="file.csv")
    message = str(caught.value)
    assert message.startswith(f"file.csv: sequence {row + 1} ({sequences[row]!r}) has {foreign!r} ")
    assert message.endswith(f" at position {column + 1}; allowed: the letters of {alphabet!r}")


@SETTINGS
@given(st.data())
def test_a_wrong_length_is_named(data):
    environment = data.draw(environments())
    space = environment.space
    length = data.draw(st.integers(0, 60).filter(lambda n: not space.min_length <= n <= space.max_length))
    good = data.draw(strings(environment, max_size=3))
    with pytest.raises(SequenceError, match=f"^x: sequence {len(good) + 1} .* has length {length}; allowed: "):
        environment.tokens([*good, environment.config.alphabet[0] * length], origin="x")


@SETTINGS
@given(environments(max_letters=40), st.floats(0, 1))
def test_kernels_are_laws_on_the_allowed_outcomes(environment, alpha):
    allowed = environment.space.allowed
    kernel = UniformSubstitution(alpha).kernel(allowed)
    np.testing.assert_allclose(kernel.sum(-1), allowed, rtol=0, atol=1e-12)
    assert (kernel >= 0).all()
    for step, row in enumerate(allowed):
        assert not kernel[step][:, ~row].any()
        kept = np.diagonal(kernel[step])[row]
        np.testing.assert_allclose(kept, 1 - alpha + alpha / row.sum(), rtol=0, atol=1e-12)


@SETTINGS
@given(environments(max_letters=40), st.data())
def test_realised_tokens_are_possible_outcomes_of_the_intention(environment, data):
    step = data.draw(st.integers(0, environment.space.max_length - 1))
    action = data.draw(st.sampled_from(np.flatnonzero(environment.space.allowed[step]).tolist()))
    uniforms = data.draw(st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=20))
    realised = environment.noise.realise(step, np.full(len(uniforms), action), np.asarray(uniforms, np.float32))
    assert (environment.kernel[step, action, realised] > 0).all()
    order = np.argsort(uniforms, kind="stable")
    assert (np.diff(realised[order]) >= 0).all(), "one uniform number each, by inversion"


@SETTINGS
@given(st.data())
def test_intended_sequences_are_realised_without_noise(data):
    environment = data.draw(environments())
    sequences = data.draw(strings(environment, min_size=1, max_size=5))
    tokens, lengths = environment.tokens(sequences, origin="o")
    actions, rng = environment.as_actions(tokens, lengths), np.random.default_rng(0)
    policy = Policy(environment.space, MLPConfig(hidden_size=2, num_layers=1, kmer_sizes=()), backward_head=False)
    batch = draw_trajectories(policy, environment, environment.intact, len(sequences), rng, intended=actions)
    found = environment.lengths(batch.tokens, batch.num_steps)
    assert found.tolist() == lengths.tolist()
    assert [s.decode() for s in environment.sequences(batch.tokens, found).tolist()] == sequences
    assert np.isnan(batch.log_behaviour[:, 0]).all()


@settings(SETTINGS, max_examples=40)
@given(environments(), st.floats(0.05, 20), st.floats(0, 1), st.integers(0, 2**31))
def test_rollouts_are_sequences_of_the_space(environment, temperature, epsilon, seed):
    torch.manual_seed(seed)
    policy = Policy(environment.space, MLPConfig(hidden_size=4, num_layers=1, kmer_sizes=()), backward_head=False)
    torch.nn.init.normal_(policy.network.head.weight, std=3.0)
    batch = draw_trajectories(
        policy,
        environment,
        environment.noise,
        64,
        np.random.default_rng(seed),
        temperature=temperature,
        epsilon=epsilon,
    )
    space = environment.space
    steps = np.arange(space.max_length)
    taken = steps < batch.num_steps[:, None]
    for outcomes in (batch.tokens, batch.actions):
        assert space.allowed[steps, outcomes][taken].all()
        assert not outcomes[~taken].any()
    lengths = environment.lengths(batch.tokens, batch.num_steps)
    assert ((space.min_length <= lengths) & (lengths <= space.max_length)).all()
    sequences = [s.decode() for s in environment.sequences(batch.tokens, lengths).tolist()]
    np.testing.assert_array_equal(environment.tokens(sequences, origin="o")[1], lengths)
    assert np.isfinite(batch.log_behaviour).all()
    assert (batch.log_behaviour <= 1e-5).all()


@SETTINGS
@given(
    st.integers(1, 12), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6), st.sampled_from("ab")), max_size=15)
)
def test_a_buffer_holds_what_a_queue_would(capacity, adds):
    buffer, queue = ReplayBuffer(ReplayConfig(capacity=capacity), 2, seed=0), deque(maxlen=capacity)
    last, first, duplicates = {"a": -1, "b": -1}, 0, 0
    for size, number, source in adds:
        accepted = buffer.add(numbered(size, first), source, number)
        assert accepted == (size if number > last[source] else 0)
        if number > last[source]:
            queue.extend(range(first, first + size))
            last[source], first = number, first + size
        else:
            duplicates += size
    assert (len(buffer), buffer.num_added, buffer.num_duplicates) == (len(queue), first, duplicates)
    assert buffer.statistics()["buffer_oldest_version"] == (queue[0] if queue else 0)
    if queue:
        drawn = buffer.sample(200)
        assert set(drawn.seed.tolist()) == set(queue)  # a row of 12 is missed by 200 draws once in 35 million
        np.testing.assert_array_equal(drawn.seed, drawn.policy_version)


@SETTINGS
@given(st.integers(1, 9), st.integers(0, 20), st.integers(0, 5), st.integers(0, 2**31))
def test_a_saved_buffer_continues_as_if_nothing_had_happened(capacity, size, num_offline, seed):
    config = ReplayConfig(capacity=capacity, replay_share=0.3, offline_share=0.3, offline_source="lower_half")
    buffer, other = (ReplayBuffer(config, 2, seed=s) for s in (seed, seed + 1))
    buffer.add(numbered(size, 0), "a", 3)
    buffer.set_offline(numbered(num_offline, 1000))
    with tempfile.TemporaryDirectory() as folder:
        buffer.save(Path(folder) / "b")
        other.load(Path(folder) / "b")
    for part in (buffer, other):
        part.add(numbered(4, 50), "a", 4)
    for left, right in zip(buffer.draw(20, 20), other.draw(20, 20), strict=True):
        assert (left is None) == (right is None)
        assert left is None or left.seed.tolist() == right.seed.tolist()
    assert buffer.statistics() == other.statistics()


@SETTINGS
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.data())
def test_every_slice_of_a_mix_keeps_the_shares(sizes, data):
    batches = [numbered(size, 100 * i) for i, size in enumerate(sizes)]
    mixed, total = mix(batches), sum(sizes)
    assert sorted(mixed.seed.tolist()) == sorted(n for batch in batches for n in batch.seed.tolist())
    end = data.draw(st.integers(0, total))
    for i, size in enumerate(sizes):
        found = int((mixed.seed[:end] // 100 == i).sum())
        assert abs(found - end * size / max(1, total)) <= len(sizes)


@SETTINGS
@given(st.data())
def test_a_lookup_knows_what_is_listed_and_nothing_else(data):
    environment = data.draw(environments(max_letters=3, max_length=4))
    sequence = strings(environment, min_size=1, max_size=1).map(lambda found: found[0])
    listed = data.draw(st.dictionaries(sequence, st.floats(0, 50, width=32), min_size=1, max_size=12))
    missing = data.draw(st.none() | st.floats(0, 5, width=32))
    tokens, lengths = environment.tokens(list(listed), origin="o")
    names, scores = environment.sequences(tokens, lengths), np.asarray(list(listed.values()), np.float64)
    oracle = LookupOracle(environment, names, scores, LookupConfig(missing_score=missing), origin="o")
    everything = environment.space.enumerate()
    expected = [
        listed.get(s.decode(), np.nan if missing is None else missing)
        for s in environment.sequences(*everything).tolist()
    ]
    np.testing.assert_array_equal(oracle.score(*everything), np.asarray(expected, np.float32))
    assert sorted(listed) == [s.decode() for s in oracle.reference.tolist()]


@SETTINGS
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=16, unique=True))
def test_minmax_keeps_the_order_within_zero_and_one(scores):
    environment = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=2))
    tokens, lengths = (array[: len(scores)] for array in environment.space.enumerate())
    names, config = environment.sequences(tokens, lengths), LookupConfig(normalise="minmax")
    if len(scores) == 1:
        with pytest.raises(OracleDataError, match=r"all scores are .*, so they cannot be mapped to 0\.\.1"):
            LookupOracle(environment, names, np.asarray(scores), config, origin="o")
        return
    found = LookupOracle(environment, names, np.asarray(scores), config, origin="o").score(tokens, lengths)
    assert (found.min(), found.max()) == (0, 1)
    assert (np.diff(found[np.argsort(scores)]) >= 0).all()


@SETTINGS
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_a_table_agrees_with_the_enumeration(num_tokens, length, seed):
    environment = SequenceEnvironment(EnvironmentConfig(alphabet="ABCDE"[:num_tokens], length=length))
    table = np.random.default_rng(seed).random(num_tokens**length, dtype=np.float32)
    np.testing.assert_array_equal(TableOracle(table, num_tokens).score(*environment.space.enumerate()), table)
