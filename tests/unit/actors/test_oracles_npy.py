"""Pairs of arrays as Design-Bench stores them."""

import os

import numpy as np
import pytest

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.oracles.base import OracleDataError
from actors.oracles.table import LookupOracle, NpyOracleConfig, npy_oracle

FIXED = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=3))
TOKENS = np.array([[0, 1, 2], [3, 3, 3]])


@pytest.fixture
def load(tmp_path):
    """Writes the two files and builds the oracle; bytes are written as they are."""

    def build(tokens, scores, environment: SequenceEnvironment = FIXED, **settings) -> LookupOracle:
        for name, content in (("x.npy", tokens), ("y.npy", scores)):
            if isinstance(content, bytes):
                (tmp_path / name).write_bytes(content)
            else:
                np.save(tmp_path / name, content, allow_pickle=True)
        config = NpyOracleConfig(name="npy", tokens_path=tmp_path / "x.npy", scores_path=tmp_path / "y.npy", **settings)
        return npy_oracle(config, environment)

    return build


@pytest.fixture
def refused(load, tmp_path):
    """File and message of the error that two arrays give."""

    def message(tokens, scores, environment: SequenceEnvironment = FIXED, **settings) -> tuple[str, str]:
        with pytest.raises(OracleDataError) as caught:
            load(tokens, scores, environment, **settings)
        assert str(caught.value).startswith(f"{tmp_path}/"), "the message names no file"
        file, _, rest = str(caught.value).removeprefix(f"{tmp_path}/").partition(": ")
        return file, rest

    return message


def ask(oracle: LookupOracle, *sequences: str) -> list[float]:
    return oracle.score(*FIXED.tokens(sequences, origin="test")).tolist()


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.uint64])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_scores_belong_to_their_rows(load, dtype, shape):
    oracle = load(TOKENS.astype(dtype), np.array([0.5, 2.0], np.float32).reshape(shape))
    assert ask(oracle, "TTT", "ACG", "AAA") == [2, 0.5, 0]
    assert oracle.reference.tolist() == [b"ACG", b"TTT"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int32])
def test_scores_may_be_normalised(load, dtype):
    oracle = load(np.array([[0, 1, 2], [3, 3, 3], [1, 1, 1]]), np.array([-4, 4, 0], dtype), normalise="minmax")
    assert ask(oracle, "ACG", "TTT", "CCC", "AAA") == [0, 1, 0.5, 0]


def test_repeated_rows_with_one_score_are_allowed(load):
    """Design-Bench lists palindromes twice, with scores that agree to single precision."""
    oracle = load(np.concatenate([TOKENS, TOKENS]), np.array([0.5, 0.3, 0.5, 0.3 + 2e-8]))
    assert ask(oracle, "ACG") == [0.5]
    assert len(oracle.reference) == 2


def test_repeated_rows_with_two_scores_are_refused(refused):
    file, message = refused(np.concatenate([TOKENS, TOKENS]), np.array([0.5, 0.3, 0.5, 0.4]))
    assert file == "y.npy"
    assert message == "sequence TTT is listed with the scores 0.3 and 0.4 (row 4); each sequence may have one score"


@pytest.mark.parametrize("shape", [(2,), (2, 4), (2, 2), (2, 3, 1), ()])
def test_tokens_of_another_shape_are_refused(refused, shape):
    assert refused(np.zeros(shape, int), np.ones(2)) == ("x.npy", f"shape {shape}; allowed: [n, 3], fixed length")


def test_an_environment_of_varying_length_is_refused(refused):
    environment = SequenceEnvironment(EnvironmentConfig(length=3, variable_length=True))
    assert refused(TOKENS, np.ones(2), environment) == ("x.npy", "shape (2, 3); allowed: [n, 3], fixed length")


@pytest.mark.parametrize("tokens", [TOKENS - 1, TOKENS + 1, TOKENS.astype(float), TOKENS > 0, TOKENS.astype(str)])
def test_tokens_outside_the_alphabet_are_refused(refused, tokens):
    assert refused(tokens, np.ones(2)) == ("x.npy", "allowed are integers in 0..3")


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 2), ()])
def test_another_number_of_scores_is_refused(refused, shape):
    scores = np.ones(shape)
    assert refused(TOKENS, scores) == ("y.npy", f"{scores.size} scores for 2 sequences")


def test_scores_that_cannot_be_used_are_refused(refused):
    assert refused(TOKENS, np.array(["1", "2"])) == ("y.npy", "holds <U1; allowed: numbers")
    assert refused(TOKENS, np.array([1, np.nan])) == ("y.npy", "row 2 has the score nan; allowed: finite numbers")
    file, message = refused(TOKENS, np.array([1, -2]))
    assert (file, message[:35]) == ("y.npy", "row 2 has the negative score -2; al")


def test_complex_scores_are_refused(refused):
    file, message = refused(TOKENS, np.array([1 + 1j, 2]))
    assert file == "y.npy"
    assert "allowed" in message


def test_arrays_without_rows_are_refused(refused):
    _, message = refused(np.zeros((0, 3), int), np.zeros(0))
    assert "holds no sequence" in message


def test_pickled_arrays_are_never_loaded(refused, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    trap = np.array([Trap(), Trap()], dtype=object)
    assert refused(trap, np.ones(2))[0] == "x.npy"
    assert refused(TOKENS, trap)[0] == "y.npy"
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"sequence,score\n", b"\x93NUMPY\x01\x00", b"PK\x03\x04 cut short"])
def test_files_that_are_no_arrays_are_refused(refused, content):
    file, message = refused(content, np.ones(2))
    assert (file, message[:27]) == ("x.npy", "not a readable .npy array (")
    assert refused(TOKENS, content)[0] == "y.npy"


def test_archives_of_arrays_are_refused(refused, tmp_path):
    np.savez(tmp_path / "both.npz", x=TOKENS, y=np.ones(2))
    archive = (tmp_path / "both.npz").read_bytes()
    assert refused(archive, np.ones(2))[0] == "x.npy"
    assert refused(TOKENS, archive)[0] == "y.npy"


def test_a_missing_file_is_named(tmp_path):
    np.save(tmp_path / "x.npy", TOKENS)
    config = NpyOracleConfig(name="npy", tokens_path=tmp_path / "x.npy", scores_path=tmp_path / "y.npy")
    with pytest.raises(OracleDataError, match=r"y\.npy: not a readable \.npy array \(.*No such file"):
        npy_oracle(config, FIXED)
