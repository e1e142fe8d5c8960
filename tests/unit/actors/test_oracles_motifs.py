"""Binding sites by JASPAR motifs."""

import functools
import math
import socket
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.oracles import motifs
from actors.oracles.base import OracleDataError
from actors.oracles.jaspar import LETTERS, PSEUDOCOUNT, RELEASE, motif_matrices
from actors.oracles.motifs import MotifsConfig, MotifsOracle
from actors.oracles.registry import build_oracle
from distributed.config import DEFAULT_CONFIG, ConfigError, load_config, validate
from distributed.run import main

CTCF, GATA1, SPI1 = "MA0139.2", "MA0035.5", "MA0080.7"
DNA = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=50))
COMPLEMENT = str.maketrans("ACGT", "TGCA")


def environment(alphabet: str = "ACGT", length: int = 50, *, min_length: int | None = None) -> SequenceEnvironment:
    """Of variable length if `min_length` is given."""
    varying = {} if min_length is None else {"variable_length": True, "min_length": min_length}
    return SequenceEnvironment(EnvironmentConfig(alphabet=alphabet, length=length, **varying))


def oracle(*names: str, env: SequenceEnvironment = DNA, **settings) -> MotifsOracle:
    return MotifsOracle(MotifsConfig(name="motifs", motifs=names, **settings), env)


def ask(built: MotifsOracle, *sequences: str, env: SequenceEnvironment = DNA) -> np.ndarray:
    return built.score(*env.tokens(sequences, origin="test"))


def random_sequences(count: int, shortest: int, longest: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(LETTERS), n)) for n in rng.integers(shortest, longest + 1, count)]


def reverse_complement(sequence: str) -> str:
    return sequence.translate(COMPLEMENT)[::-1]


@functools.cache
def log_odds_of(matrix_id: str, pseudocount: float = PSEUDOCOUNT) -> np.ndarray:
    return motif_matrices([matrix_id], pseudocount=pseudocount)[0].log_odds


def consensus(matrix_id: str) -> str:
    return "".join(LETTERS[column] for column in log_odds_of(matrix_id).argmax(1))


def slow_sum(sequence: str, log_odds: np.ndarray, softness: float = 1.0) -> float:
    width, total = len(log_odds), 0.0
    for strand in (sequence, reverse_complement(sequence)):
        for start in range(len(sequence) - width + 1):
            site = strand[start : start + width]
            total += math.exp(sum(log_odds[i, LETTERS.index(letter)] for i, letter in enumerate(site)) / softness)
    return softness * math.log(total) if total else -math.inf


def slow_affinity(sequence: str, log_odds: np.ndarray, softness: float) -> float:
    return max(0.0, slow_sum(sequence, log_odds, softness)) / log_odds.max(1).sum()


def slow_score(sequence: str, config: MotifsConfig) -> float:
    def mean(names: tuple[str, ...]) -> float:
        matrices = [log_odds_of(name, config.pseudocount) for name in names]
        return sum(slow_affinity(sequence, log_odds, config.softness) for log_odds in matrices) / len(names)

    score = mean(config.motifs)
    if config.repressors:
        score -= config.repressor_weight * mean(config.repressors)
    if config.gc_target is not None:
        share = (sequence.count("G") + sequence.count("C")) / len(sequence) if sequence else 0.0
        score -= config.gc_weight * (share - config.gc_target) ** 2
    return max(0.0, score)


@pytest.mark.parametrize("matrix_id", [CTCF, GATA1, "MA0080.1", "MA0062.1"])
@pytest.mark.parametrize("pseudocount", [0.8, 3.0])
def test_log_odds_are_those_of_biopython(matrix_id, pseudocount):
    import pyjaspar

    (motif,) = motif_matrices([matrix_id], pseudocount=pseudocount)
    theirs = pyjaspar.jaspardb(release=RELEASE).fetch_motif_by_id(matrix_id)
    bits = theirs.counts.normalize(pseudocounts=pseudocount / 4).log_odds()
    expected = np.array([bits[letter] for letter in LETTERS]).T * math.log(2)
    assert (motif.matrix_id, motif.name) == (matrix_id, theirs.name)
    np.testing.assert_allclose(motif.log_odds, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("MA0139.2", "MA0139.2"),
        ("MA0139.1", "MA0139.1"),
        ("ma0139.2", "MA0139.2"),
        ("MA0139", "MA0139.2"),
        ("UN0484", "UN0484.2"),  # an id may lie outside of CORE
        ("SPI1", "MA0080.7"),  # written Spi1 in its latest version
        ("TFAP2A", "MA0003.5"),  # the lowest of three ids of vertebrates
        ("CTCF", "MA0139.2"),  # so here too, where an insect has one more
        ("rel", "MA0101.1"),  # insects and urochordates have others
        ("br", "MA0010.2"),  # four, all of insects
        ("FOS::JUN", "MA0099.4"),
    ],
)
def test_ids_and_names(asked, expected):
    assert [motif.matrix_id for motif in motif_matrices([asked])] == [expected]


def test_matrices_come_in_the_order_asked_for():
    assert [m.matrix_id for m in motif_matrices([SPI1, "MA0139", GATA1])] == [SPI1, CTCF, GATA1]
    assert motif_matrices([]) == []


@pytest.mark.parametrize(
    ("asked", "similar"),
    [("CTCFF", "CTCF, CTCFL"), ("gatta1", "GATA1"), ("MA0139.9", "MA0139"), ("GATA'1", "GATA1")],
)
def test_an_unknown_motif_is_answered_with_similar_ones(asked, similar):
    with pytest.raises(OracleDataError) as caught:
        motif_matrices([CTCF, asked], origin="here")
    start, _, found = str(caught.value).partition("; similar: ")
    assert start == f"here: got {asked!r}; allowed: a matrix id of JASPAR2026 or a name of its CORE collection"
    assert similar in found


@pytest.mark.parametrize("asked", ["", "%", "no such factor at all"])
def test_an_unknown_motif_that_resembles_none(asked):
    with pytest.raises(OracleDataError, match=f"got '{asked}'; .* CORE collection$"):
        motif_matrices([asked])


def test_a_name_that_only_other_groups_share_is_ambiguous():
    with pytest.raises(OracleDataError) as caught:
        motif_matrices(["HNF4"])
    assert str(caught.value) == (
        "oracle.motifs: the name 'HNF4' is ambiguous; allowed: an id, one of MA2111.1 (urochordates), MA2242.1 (insects)"
    )


def test_loading_needs_no_network_and_warns_of_nothing(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(motif_matrices([CTCF, "SPI1"])) == 2
        with pytest.raises(OracleDataError):
            motif_matrices(["MA9999"])


def test_biopython_is_imported_only_when_it_is_needed():
    program = "import sys, actors.oracles.registry; sys.exit('Bio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"softness": 0.1},
        {"softness": 5.0, "pseudocount": 4.0},
        {"gc_target": 0.7, "gc_weight": 2.0},
        {"repressors": ("MA0080.1", "MA0062.1"), "repressor_weight": 0.3},
        {"repressors": ("MA0080.1",), "gc_target": 0.0, "gc_weight": 0.1, "repressor_weight": 0.2},
    ],
)
@pytest.mark.parametrize("alphabet", ["ACGT", "TGAC"])
@pytest.mark.parametrize("min_length", [None, 0])
def test_scores_are_those_of_the_slow_reference(settings, alphabet, min_length):
    env = environment(alphabet, 24, min_length=min_length)
    built = oracle(CTCF, GATA1, SPI1, env=env, **settings)
    config = MotifsConfig(name="motifs", motifs=(CTCF, GATA1, SPI1), **settings)
    sequences = random_sequences(30, 24 if min_length is None else 0, 24)
    sequences += [
        (consensus(GATA1) * 4)[:24],
        (consensus(SPI1) * 2)[:24],
        reverse_complement(consensus(CTCF)) + "A" * 9,
    ]
    scores = ask(built, *sequences, env=env)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [slow_score(s, config) for s in sequences], rtol=1e-4, atol=1e-5)
    assert (scores > 0).sum() > 3, "the comparison says nothing"


def test_affinities_are_those_of_each_motif_then_each_repressor():
    sequences = random_sequences(5, 50, 50)
    built = oracle(GATA1, SPI1, repressors=(CTCF,))
    found = built.binding(*DNA.tokens(sequences, origin="test"))
    expected = [[slow_affinity(s, motif.log_odds, 1.0) for motif in built.motifs] for s in sequences]
    assert [motif.matrix_id for motif in built.motifs] == [GATA1, SPI1, CTCF]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.text(alphabet=LETTERS, max_size=40), st.sampled_from(["ACGT", "GTCA"]))
def test_both_strands_score_alike(sequence, alphabet):
    env = environment(alphabet, 40, min_length=0)
    built = oracle(CTCF, GATA1, repressors=(SPI1,), repressor_weight=0.5, gc_target=0.5, env=env)
    forward, reverse = ask(built, sequence, reverse_complement(sequence), env=env)
    assert forward == pytest.approx(reverse, abs=1e-5)
    assert np.isfinite(forward)
    assert forward >= 0


@pytest.mark.parametrize("matrix_id", [CTCF, GATA1, SPI1])
def test_a_perfect_site_has_affinity_one_and_more_sites_have_more(matrix_id):
    site, env = consensus(matrix_id), environment(length=50, min_length=1)
    planted = ["T" * n + text + "T" * (50 - n - len(text)) for n, text in ((3, site), (20, reverse_complement(site)))]
    alone, *one = ask(oracle(matrix_id, env=env), site, *planted, env=env)
    assert alone == pytest.approx(1, abs=0.01)
    assert min(one) >= alone - 1e-5
    assert max(one) < 1.1
    two = ask(oracle(matrix_id, env=env), site + "TTTT" + site, env=env)[0]
    assert two > 1 + 0.5 * math.log(2) / log_odds_of(matrix_id).max(1).sum()
    assert ask(oracle(matrix_id, softness=0.01, env=env), planted[0], env=env)[0] == pytest.approx(1, abs=0.005)


def test_occupancies_by_the_formula():
    """Half bound at 3/4 of the consensus' log-odds, here against a background with 40% G and C; scores are their mean."""
    settings = {"scale": "occupancy", "gc_background": 0.4, "repressors": (CTCF,), "repressor_weight": 0.5}
    built, sequences = oracle(GATA1, SPI1, **settings), [*random_sequences(20, 50, 50), consensus(SPI1) * 3 + "A" * 11]
    expected, background = np.empty((len(sequences), 3)), np.log([1.2, 0.8, 0.8, 1.2])
    for column, name in enumerate((GATA1, SPI1, CTCF)):
        log_odds = log_odds_of(name) - background
        best = log_odds.max(1).sum()
        sums = np.array([slow_sum(sequence, log_odds) for sequence in sequences])
        expected[:, column] = 1 / (1 + np.exp(-(sums - 0.75 * best) / 1.5))
    np.testing.assert_allclose(built.binding(*DNA.tokens(sequences, origin="test")), expected, rtol=1e-3, atol=1e-6)
    scores = np.maximum(0, expected[:, :2].mean(1) - 0.5 * expected[:, 2])
    np.testing.assert_allclose(ask(built, *sequences), scores, rtol=1e-3, atol=1e-6)
    assert scores[-1] > 0.45


def test_sites_add_up_without_limit():
    site, env = consensus(GATA1), environment(length=400, min_length=1)
    scores = ask(oracle(GATA1, env=env), *(site * n for n in (1, 2, 5, 20, 50)), env=env)
    assert (np.diff(scores) > 0.05).all()


def test_repressors_lower_the_score_and_gc_has_its_target():
    both = consensus(GATA1) + "AT" * 10 + consensus(SPI1) + "AT" * 5
    plain, repressed = (ask(oracle(GATA1, repressors=r), both)[0] for r in ((), (SPI1,)))
    assert repressed < plain - 0.9
    half, none = (ask(oracle(GATA1, gc_target=target), both)[0] for target in (1.0, None))
    share = (both.count("G") + both.count("C")) / 50
    assert none - half == pytest.approx((1 - share) ** 2, abs=1e-5)
    assert ask(oracle(GATA1, gc_target=1.0, gc_weight=1e300, repressors=(SPI1,), repressor_weight=1e300), both) == 0


def test_only_what_lies_within_the_length_counts():
    env = environment("CAGT", 40, min_length=0)
    built = oracle(GATA1, CTCF, env=env, gc_target=0.3)
    sequences = random_sequences(60, 0, 40, seed=1)
    tokens, lengths = env.tokens(sequences, origin="test")
    rubbish = np.random.default_rng(2).integers(0, 5, tokens.shape)  # the end token too
    filled = np.where(np.arange(40) < lengths[:, None], tokens, rubbish)
    assert np.array_equal(built.score(tokens, lengths), built.score(filled, lengths))


def test_a_sequence_shorter_than_a_motif_has_no_affinity_for_it():
    env = environment(length=20, min_length=0)
    built = oracle(CTCF, GATA1, env=env)
    tokens, lengths = env.tokens([consensus(CTCF)[:14], consensus(GATA1)[:6], ""], origin="test")
    affinities = built.binding(tokens, lengths)
    assert affinities[:, 0].tolist() == [0, 0, 0]
    assert affinities[1:, 1].tolist() == [0, 0]


def test_batches_of_any_size_and_in_chunks_score_alike(monkeypatch):
    built, sequences = oracle(CTCF, GATA1), random_sequences(100, 50, 50)
    whole = ask(built, *sequences)
    assert built.score(np.zeros((0, 50), np.int16), np.zeros(0, np.int16)).shape == (0,)
    np.testing.assert_allclose([ask(built, s)[0] for s in sequences[:5]], whole[:5], atol=1e-6)
    monkeypatch.setattr(motifs, "CHUNK_BYTES", 50_000)
    np.testing.assert_allclose(ask(built, *sequences), whole, atol=1e-6)
    monkeypatch.setattr(motifs, "CHUNK_BYTES", 1)
    np.testing.assert_allclose(ask(built, *sequences), whole, atol=1e-6)


def test_a_motif_that_does_not_fit_is_refused():
    message = r"MA0139\.2 \(CTCF\) is 15 wide; allowed: up to environment\.length 14"
    for settings in ({"motifs": (GATA1, CTCF)}, {"motifs": (GATA1,), "repressors": (CTCF,)}):
        with pytest.raises(OracleDataError, match=message):
            MotifsOracle(MotifsConfig(name="motifs", **settings), environment(length=14))
    fitting = environment(length=15)
    assert ask(oracle(CTCF, env=fitting), consensus(CTCF), env=fitting)[0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("alphabet", ["ACGU", "ACGTN", "acgt", "ACG"])
def test_another_alphabet_is_refused(alphabet):
    with pytest.raises(OracleDataError, match=f"alphabet of the letters ACGT in any order, got '{alphabet}'"):
        oracle(GATA1, env=environment(alphabet))


def test_two_names_of_one_motif_are_refused():
    with pytest.raises(OracleDataError, match=r"'MA0035' and 'gata1' are both MA0035\.5 \(GATA1\)"):
        oracle("MA0035", "gata1")
    with pytest.raises(OracleDataError, match=r"'SPI1' and 'MA0080\.7' are both .*; each motif may be listed once"):
        oracle("SPI1", repressors=(SPI1,))


def test_unknown_repressors_are_named_as_such():
    with pytest.raises(OracleDataError, match=r"^oracle\.repressors: got 'SPI0'"):
        oracle(GATA1, repressors=("SPI0",))


def test_the_registry_builds_it_from_a_config():
    values = {"name": "motifs", "motifs": ["CTCF", "GATA1"], "repressors": ["SPI1"], "gc_target": 0.5, "softness": 0.5}
    config = validate({"oracle": values, "environment": {"length": 50}})
    assert validate({"oracle": config.oracle.model_dump(mode="json"), "environment": {"length": 50}}) == config
    built = build_oracle(config.oracle, SequenceEnvironment(config.environment))
    try:
        assert isinstance(built, MotifsOracle)
        assert built.enumerable
        assert built.reference is None
    finally:
        built.close()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, r"oracle\.motifs: missing; it has no default"),
        ({"motifs": []}, r"oracle\.motifs: got \[\]; .*at least 1"),
        ({"motifs": "CTCF"}, r"oracle\.motifs: got 'CTCF'; .*tuple"),
        ({"motifs": ["CTCF", 3]}, r"oracle\.motifs\.1: got 3"),
        ({"motifs": ["CTCF", "ctcf"]}, r"oracle\.motifs: got \['CTCF', 'ctcf'\]; each motif may be listed once"),
        ({"repressors": ["SPI1", "SPI1"]}, r"oracle\.repressors: got .*; each motif may be listed once"),
        ({"gc_target": 1.5}, r"oracle\.gc_target: got 1\.5"),
        ({"gc_weight": -1}, r"oracle\.gc_weight: got -1"),
        ({"repressor_weight": -1}, r"oracle\.repressor_weight: got -1"),
        ({"softness": 0}, r"oracle\.softness: got 0"),
        ({"pseudocount": 0}, r"oracle\.pseudocount: got 0"),
        ({"colour": "red"}, r"oracle\.colour: unknown key; allowed: name, motifs, repressors"),
    ],
)
def test_a_mistake_in_the_config_is_named(values, expected):
    motif = {} if not values or "motifs" in values else {"motifs": ["CTCF"]}
    with pytest.raises(ConfigError, match=expected):
        validate({"oracle": {"name": "motifs", **motif, **values}})


def test_it_can_be_chosen_on_the_command_line():
    overrides = [("oracle.motifs", "[MA0139.2, GATA1]"), ("oracle.name", "motifs"), ("oracle.gc_target", "0.5")]
    config = load_config(DEFAULT_CONFIG, overrides).oracle
    assert config == MotifsConfig(name="motifs", motifs=(CTCF, "GATA1"), gc_target=0.5)


def test_what_only_the_matrices_show_is_a_config_error_before_anything_starts(in_tmp_path):
    for motif, expected in (("GATTA1", "similar: .*GATA1"), (CTCF, "15 wide; allowed: up to environment.length 8")):
        with pytest.raises(ConfigError, match=expected):
            main(["--run.name", "x", "--oracle.name", "motifs", "--oracle.motifs", f"[{motif}]"])
    assert not (in_tmp_path / "runs").exists()
