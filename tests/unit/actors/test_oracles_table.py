"""Oracles that look scores up: tables of a whole space and CSV files."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.oracles.base import OracleDataError
from actors.oracles.table import MAX_LINE, CsvOracleConfig, LookupOracle, TableOracle, csv_oracle, read_sequences

FIXED = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=3))
VARIABLE = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=4, variable_length=True, min_length=2))


@pytest.fixture
def load(tmp_path):
    """Writes a CSV file and builds the oracle."""

    def build(content: str | bytes, environment: SequenceEnvironment = FIXED, **settings) -> LookupOracle:
        path = tmp_path / "data.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return csv_oracle(CsvOracleConfig(name="csv", path=path, **settings), environment)

    return build


@pytest.fixture
def refused(load, tmp_path):
    """The message, less the file's name, of the error that a CSV file gives."""

    def message(content: str | bytes, environment: SequenceEnvironment = FIXED, **settings) -> str:
        with pytest.raises(OracleDataError) as caught:
            load(content, environment, **settings)
        start = f"{tmp_path / 'data.csv'}: "
        assert str(caught.value).startswith(start)
        return str(caught.value).removeprefix(start)

    return message


def ask(oracle: LookupOracle, sequences: list[str], environment: SequenceEnvironment = FIXED) -> list[float]:
    scores = oracle.score(*environment.tokens(sequences, origin="test"))
    assert scores.dtype == np.float32
    return [round(float(score), 6) for score in scores]


def test_a_table_is_read_in_lexicographic_order():
    oracle = TableOracle(np.arange(64, dtype=np.float32), 4)
    assert ask(oracle, ["AAA", "AAC", "ACA", "CAA", "TTT"]) == [0, 1, 4, 16, 63]
    tokens, lengths = FIXED.space.enumerate()
    np.testing.assert_array_equal(oracle.score(tokens, lengths), np.arange(64))
    assert oracle.enumerable
    assert oracle.reference is None


def test_listed_sequences_have_their_scores_and_others_the_missing_score(load):
    oracle = load("sequence,score\nTTT,0.25\nAAA,1\nACG,0\n")
    assert ask(oracle, ["ACG", "AAA", "GGG", "TTT", "AAA", "AAC"]) == [0, 1, 0, 0.25, 1, 0]
    assert ask(load("sequence,score\nAAA,1\n", missing_score=0.5), ["AAA", "TTT", "CCC"]) == [1, 0.5, 0.5]
    assert oracle.enumerable


def test_a_missing_score_of_null_means_no_score(load):
    oracle = load("sequence,score\nACG,2\n", missing_score=None)
    np.testing.assert_array_equal(ask(oracle, ["AAA", "ACG", "TTT"]), [np.nan, 2, np.nan])


def test_listed_sequences_are_the_reference_for_novelty(load):
    oracle = load("sequence,score\nTTT,1\nAAA,0\nTTT,1\n")
    assert oracle.reference.tolist() == [b"AAA", b"TTT"]


def test_columns_may_have_other_names_orders_and_neighbours(load):
    text = 'id,E,"DNA"\n1, 0.5 , AAA \n2,1e-1,"CCC"\n'
    oracle = load(text, sequence_column="DNA", score_column="E")
    assert ask(oracle, ["AAA", "CCC"]) == [0.5, 0.1]


@pytest.mark.parametrize(
    "text", ["\ufeffsequence,score\nAAA,1\n", "sequence,score\r\nAAA,1\r\n", "sequence,score\nAAA,1"]
)
def test_byte_order_marks_and_other_line_ends_are_read(load, text):
    assert ask(load(text), ["AAA", "TTT"]) == [1, 0]


@pytest.mark.parametrize("score", [0.7, 100.1, 12345.678, 1e6 + 0.3])
def test_scores_of_any_size_are_kept_and_may_be_repeated(load, score):
    oracle = load(f"sequence,score\nAAA,{score}\nCCC,1\nAAA,{score}\n")
    np.testing.assert_allclose(ask(oracle, ["AAA", "CCC"]), [score, 1], rtol=1e-6)


def test_contradicting_scores_are_refused(refused):
    message = refused("sequence,score\nAAA,0.5\nCCC,1\nAAA,0.6\n")
    assert message == "sequence AAA is listed with the scores 0.5 and 0.6 (row 3); each sequence may have one score"


def test_minmax_maps_to_zero_and_one(load):
    oracle = load("sequence,score\nAAA,-3\nCCC,1\nGGG,-1\n", normalise="minmax")
    assert ask(oracle, ["AAA", "CCC", "GGG", "TTT"]) == [0, 1, 0.5, 0]


@pytest.mark.parametrize("offset", [1e-3, 1e-9])
def test_minmax_of_close_scores_is_still_zero_and_one(load, offset):
    oracle = load(f"sequence,score\nAAA,1\nCCC,{1 + offset!r}\n", normalise="minmax")
    assert ask(oracle, ["AAA", "CCC"]) == [0, 1]


def test_equal_scores_cannot_be_normalised_but_used(load, refused):
    text = "sequence,score\nAAA,2\nCCC,2\n"
    assert refused(text, normalise="minmax") == "all scores are 2, so they cannot be mapped to 0..1"
    assert ask(load(text), ["AAA", "CCC", "GGG"]) == [2, 2, 0]


def test_one_sequence_listed_twice_has_no_range(refused):
    text = "sequence,score\nAAA,1\nAAA,1.0000000001\n"
    assert refused(text, normalise="minmax") == "all scores are 1, so they cannot be mapped to 0..1"


def test_a_score_beyond_single_precision_is_refused(refused):
    assert refused("sequence,score\nAAA,1\nCCC,1e39\n").startswith("row 2 has the score 1e+39; allowed: ")


def test_a_negative_score_needs_normalisation(refused):
    message = refused("sequence,score\nAAA,1\nCCC,-0.5\n")
    assert message == "row 2 has the negative score -0.5; allowed: scores >= 0, or oracle.normalise: minmax"


@pytest.mark.parametrize("text", ["high", "", "1,5", "0x10"])
def test_a_score_that_is_no_number_is_named_with_its_row(refused, text):
    quoted = f'"{text}"'
    assert refused(f"sequence,score\nAAA,1\nCCC,{quoted}\n") == f"row 2 has the score {text!r}; allowed: a number"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("normalise", ["none", "minmax"])
def test_a_score_that_is_not_finite_is_named_with_its_row(refused, text, normalise):
    message = refused(f"sequence,score\nAAA,1\nCCC,{text}\nGGG,2\n", normalise=normalise)
    assert message == f"row 2 has the score {text}; allowed: finite numbers"


def test_a_row_that_is_cut_short_has_no_score(refused):
    assert refused("sequence,score\nAAA,1\nCCC\n") == "row 2 has the score ''; allowed: a number"


@pytest.mark.parametrize(
    ("environment", "rows", "expected"),
    [
        (FIXED, "AAA,1\nANA,1", "sequence 2 ('ANA') has 'N' at position 2; allowed: the letters of 'ACGT'"),
        (FIXED, "AAA,1\nCCC,1\nacg,1", "sequence 3 ('acg') has 'a' at position 1; allowed: the letters of 'ACGT'"),
        (FIXED, "AAAA,1", "sequence 1 ('AAAA') has length 4; allowed: 3"),
        (FIXED, "AAA,1\n,1", "sequence 2 ('') has length 0; allowed: 3"),
        (VARIABLE, "AAA,1\nA,1", "sequence 2 ('A') has length 1; allowed: 2..4"),
    ],
)
def test_a_sequence_outside_the_space_is_named(refused, environment, rows, expected):
    assert refused(f"sequence,score\n{rows}\n", environment) == expected


def test_a_missing_column_is_named_with_those_there_are(refused):
    assert refused("seq,score\nAAA,1\n") == "no column 'sequence'; it has ['seq', 'score']"
    assert refused("sequence,E\nAAA,1\n") == "no column 'score'; it has ['sequence', 'E']"


def test_files_without_a_sequence_are_refused(refused):
    assert refused("sequence,score\n") == "holds no sequence"
    assert "no column 'sequence'" in refused("")


def test_files_that_are_no_text_are_refused(refused):
    assert refused(b"sequence,score\nA\xe9A,1\n").startswith("cannot be read ('utf-8' codec")
    assert refused(b'sequence,score\n"' + b"A" * 200_000 + b'",1\n').startswith("cannot be read (field larger")


def test_a_missing_file_is_named(tmp_path):
    for path, reason in ((tmp_path / "absent.csv", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(OracleDataError, match=reason) as caught:
            csv_oracle(CsvOracleConfig(name="csv", path=path), FIXED)
        assert str(caught.value).startswith(f"{path}: cannot be read (")


def test_sequences_of_varying_length_are_told_apart(load):
    oracle = load("sequence,score\nAA,1\nAAA,2\nAAAA,3\nTG,4\n", VARIABLE)
    asked = ["AAA", "AA", "AAAA", "TG", "TGA", "CC"]
    assert ask(oracle, asked, VARIABLE) == [2, 1, 3, 4, 0, 0]
    tokens, lengths = np.array([[0, 0, 4, 0], [0, 0, 0, 4]], np.int16), np.array([2, 3], np.int16)
    assert oracle.score(tokens, lengths).tolist() == [1, 2]


def test_the_column_of_sequences_is_read_alone(tmp_path):
    path = tmp_path / "offline.csv"
    path.write_text("dna,sequence\nTTT, ACG \nTTT,AAA\n")
    assert read_sequences(path) == ["ACG", "AAA"]
    path.write_text("dna\nTTT\n")
    with pytest.raises(OracleDataError, match="no column 'sequence'"):
        read_sequences(path)


def test_paths_are_made_absolute_and_keys_are_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/elsewhere")
    assert CsvOracleConfig(name="csv", path="a.csv").path == tmp_path / "a.csv"
    assert CsvOracleConfig(name="csv", path="~/a.csv").path == Path("/elsewhere/a.csv")
    for settings, key in (({"missing_score": -1}, "missing_score"), ({"normalise": "z"}, "normalise"), ({"p": 1}, "p")):
        with pytest.raises(ValidationError, match=key):
            CsvOracleConfig(name="csv", path="a.csv", **settings)


def test_sequences_of_a_fasta_file(tmp_path):
    file = tmp_path / "known.fasta"
    file.write_text(">one first\nACGT\nAC\n\n>two\r\nggtt\r\n")
    assert read_sequences(file) == ["ACGTAC", "ggtt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no sequence"), ("ACGT\n>one\n", "line 1: a FASTA file begins"), ("\n", "holds no sequence")],
)
def test_a_fasta_file_that_cannot_be(tmp_path, text, message):
    file = tmp_path / "known.FA"
    file.write_text(text)
    with pytest.raises(OracleDataError, match=message):
        read_sequences(file)


def test_a_fasta_file_that_is_absent_or_endless(tmp_path):
    with pytest.raises(OracleDataError, match="cannot be read"):
        read_sequences(tmp_path / "none.fa")
    (tmp_path / "long.fa").write_text(">x\n" + "A" * (MAX_LINE + 1))
    with pytest.raises(OracleDataError, match="more than"):
        read_sequences(tmp_path / "long.fa")
