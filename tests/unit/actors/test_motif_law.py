"""The synthetic law of regulatory DNA: exact probabilities, exact samples. False-alarm rates hold for any one seed."""

import itertools

import numpy as np
import pytest

from actors.motif_law import DINUCLEOTIDES, MotifLaw, MotifLawConfig
from actors.oracles.base import OracleDataError
from learner.strands import reverse_complement

NARROW = ("NR1H4", "MA0035.5")  # 6 and 7 wide
LENGTH = 8


def law_of(length: int = LENGTH, **settings) -> MotifLaw:
    return MotifLaw(MotifLawConfig(**{"motifs": NARROW} | settings), length)


def all_sequences(length: int) -> np.ndarray:
    return np.stack(np.unravel_index(np.arange(4**length), (4,) * length), 1)


def slow_probability(law: MotifLaw, x: np.ndarray) -> float:
    """The definition: a sum over the chain's letters that a site replaced."""

    def chain(letters) -> float:
        value = law.initial[letters[0]]
        for a, b in itertools.pairwise(letters):
            value *= law.transitions[a, b]
        return value

    total, share = (1 - law.config.site_probability) * chain(x), law.config.site_probability
    for site in law.sites:
        width, starts = len(site), len(x) - len(site) + 1
        for start, strand in itertools.product(range(starts), (site, site[::-1, ::-1])):
            pasted = np.prod([strand[i, x[start + i]] for i in range(width)])
            hidden = sum(
                chain([*x[:start], *letters, *x[start + width :]])
                for letters in itertools.product(range(4), repeat=width)
            )
            total += share / len(law.sites) / starts / 2 * pasted * hidden
    return total


@pytest.mark.parametrize("site_probability", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("length", [7, 8])
def test_probabilities_sum_to_one(length, site_probability):
    law = law_of(length, site_probability=site_probability)
    assert np.exp(law.log_prob(all_sequences(length))).sum() == pytest.approx(1, abs=1e-12)


def test_probabilities_are_those_of_the_definition():
    law = law_of(7, motifs=("NR1H4",))
    x = law.sample(4, np.random.default_rng(0))
    assert np.exp(law.log_prob(x)) == pytest.approx([slow_probability(law, row) for row in x], rel=1e-10)


def test_samples_follow_the_law():
    """Chi-square over the sequences of which 5 or more are expected, the rest pooled.

    False alarms: less than 2 in 10^5, by the tail bounds of Laurent & Massart (2000, lemma 1) at e^-11.5.
    """
    law, count = law_of(), 40_000
    drawn = law.sample(count, np.random.default_rng(1)) @ 4 ** np.arange(LENGTH)[::-1]
    expected = count * np.exp(law.log_prob(all_sequences(LENGTH)))
    seen = np.bincount(drawn, minlength=4**LENGTH)
    often = expected >= 5
    pairs = [(seen[often], expected[often]), ([seen[~often].sum()], [expected[~often].sum()])]
    statistic = sum(float(np.sum((np.asarray(o) - e) ** 2 / e)) for o, e in pairs)
    freedom = int(often.sum())
    assert freedom > 300
    assert -2 * (11.5 * freedom) ** 0.5 < statistic - freedom < 2 * (11.5 * freedom) ** 0.5 + 23


def test_both_strands_are_as_likely():
    law = MotifLaw(MotifLawConfig(), 50)
    x = law.sample(200, np.random.default_rng(2))
    np.testing.assert_allclose(law.log_prob(reverse_complement(x)), law.log_prob(x), rtol=1e-12)


def test_the_chain_has_the_dinucleotides_of_the_genome():
    """Its shares hold at every position, so it is stationary."""
    law = law_of(site_probability=0.0)
    joint = law.initial[:, None] * law.transitions
    for pair, share in DINUCLEOTIDES.items():
        first, second = ("ACGT".index(letter) for letter in pair)
        assert joint[first, second] == pytest.approx(share, rel=1e-4)
        assert joint[3 - second, 3 - first] == pytest.approx(share, rel=1e-4)
    assert joint.sum(0) == pytest.approx(law.initial, abs=1e-12)
    assert law.initial[1:3].sum() == pytest.approx(0.409, abs=0.001)


def test_the_entropy_is_the_exact_one():
    """Off by more than 4.5 standard errors in 1 of 10^5 seeds."""
    law = law_of()
    log_probs = law.log_prob(all_sequences(LENGTH))
    estimate, error = law.entropy(20_000, np.random.default_rng(3))
    assert abs(estimate + float(np.exp(log_probs) @ log_probs)) < 4.5 * error
    assert error < 0.03


def test_probabilities_in_chunks_are_the_same(monkeypatch):
    law = law_of()
    x = law.sample(11, np.random.default_rng(4))
    whole = law.log_prob(x)
    monkeypatch.setattr("actors.motif_law.CHUNK", 4)
    assert law.log_prob(x).tolist() == whole.tolist()
    assert law.log_prob(x[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"motifs": ("NR1H4", "XYZZY")}, r"replay\.motif_law\.motifs: got 'XYZZY'"),
        ({"motifs": ("MA0139.2",)}, r"MA0139\.2 \(CTCF\) is 15 wide; allowed: up to environment\.length 8"),
    ],
)
def test_motifs_that_cannot_be(settings, message):
    with pytest.raises(OracleDataError, match=message):
        law_of(**settings)


def test_sequences_of_another_length_are_refused():
    with pytest.raises(ValueError, match="7 positions; allowed: 8"):
        law_of().log_prob(np.zeros((2, 7), np.int64))
