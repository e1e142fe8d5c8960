"""Limits on candidates, beside their plain definitions."""

import re

import numpy as np
import pytest

from distributed import sampling
from distributed.config import ConfigError
from distributed.config_keys import validate_section
from distributed.sampling import SampleConfig
from learner.drakes.constraints import IUPAC


def random_sequences(count: int, length: int, letters: str = "ACGT") -> np.ndarray:
    """Of all lengths from 0 on."""
    rng = np.random.default_rng(0)
    return np.array(
        ["".join(rng.choice(list(letters), rng.integers(0, length + 1))) for _ in range(count)], f"S{length}"
    )


@pytest.mark.parametrize("letters", ["ACGT", "GUCA"])
@pytest.mark.parametrize("motifs", [("GAATTC",), ("ACG", "TTN"), ("CCWGG", "RYB")])
def test_motifs_on_either_strand_are_found_where_a_pattern_finds_them(motifs, letters, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 64)
    sequences = random_sequences(300, 20, letters)
    plain = [s.decode().replace("U", "T") for s in sequences]
    other = [s.translate(str.maketrans("ACGT", "TGCA"))[::-1] for s in plain]
    pattern = re.compile("|".join("".join(f"[{IUPAC[letter]}]" for letter in motif) for motif in motifs))
    expected = [bool(pattern.search(s) or pattern.search(t)) for s, t in zip(plain, other, strict=True)]
    if motifs == ("GAATTC",):
        sequences[0], expected[0] = b"AGAAUUC" if "U" in letters else b"AGAATTC", True
    assert sampling._holds(sequences, motifs).tolist() == expected
    assert any(expected)


def test_gc_content_is_of_the_letters_that_are_there():
    sequences = random_sequences(300, 10)
    shares = [((s.count(b"G") + s.count(b"C")) / len(s)) if s else None for s in sequences.tolist()]
    kept = sampling._gc_within(sequences, 0.4, 0.6)
    assert [k for k, share in zip(kept, shares, strict=True) if share is not None] == [
        0.4 <= round(share, 9) <= 0.6 for share in shares if share is not None
    ]


def test_sequences_to_draw():
    def count(**options) -> int:
        return validate_section(SampleConfig, "", options).count

    assert count(n=5) == 5
    assert count(n=5, select="top") == 2048
    assert count(n=500, select="top") == 5000
    assert count(n=500, select="diverse", num_drawn=600) == 600


def test_alphabets_that_are_no_bases():
    sampling._check_bases("GATC")
    sampling._check_bases("ACGU")
    for alphabet in ("ACDE", "ACGTU"):
        with pytest.raises(ConfigError, match=alphabet):
            sampling._check_bases(alphabet)
