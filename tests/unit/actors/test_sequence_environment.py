"""Strings to tokens and back, lengths, and the errors of bad sequences and configs."""

import re

import numpy as np
import pytest
from pydantic import ValidationError

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment, SequenceError

FIXED = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=3))
VARIABLE = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=4, variable_length=True, min_length=2))


def refused(environment: SequenceEnvironment, sequences: list[str]) -> str:
    with pytest.raises(SequenceError) as caught:
        environment.tokens(sequences, origin="the list")
    return str(caught.value)


def test_tokens_follow_the_order_of_the_alphabet():
    tokens, lengths = FIXED.tokens(["ACG", "TTA"], origin="o")
    assert tokens.tolist() == [[0, 1, 2], [3, 3, 0]]
    assert (tokens.dtype, lengths.dtype, lengths.tolist()) == (np.int16, np.int16, [3, 3])
    reordered = SequenceEnvironment(EnvironmentConfig(alphabet="TGCA", length=3))
    assert reordered.tokens(["ACG"], origin="o")[0].tolist() == [[3, 2, 1]]


def test_shorter_sequences_are_filled_with_zeros():
    tokens, lengths = VARIABLE.tokens(["TT", "TTT", "TTTT"], origin="o")
    assert tokens.tolist() == [[3, 3, 0, 0], [3, 3, 3, 0], [3, 3, 3, 3]]
    assert lengths.tolist() == [2, 3, 4]
    assert VARIABLE.sequences(tokens, lengths).tolist() == [b"TT", b"TTT", b"TTTT"]


def test_an_empty_list_gives_empty_arrays():
    tokens, lengths = FIXED.tokens([], origin="o")
    assert tokens.shape == (0, 3)
    assert lengths.shape == (0,)
    assert len(FIXED.sequences(tokens, lengths)) == 0


def test_the_empty_sequence_exists_if_the_minimal_length_is_zero():
    environment = SequenceEnvironment(EnvironmentConfig(length=3, variable_length=True, min_length=0))
    tokens, lengths = environment.tokens(["", "A"], origin="o")
    assert lengths.tolist() == [0, 1]
    assert environment.sequences(tokens, lengths).tolist() == [b"", b"A"]
    assert environment.as_actions(tokens, lengths).tolist() == [[4, 4, 4], [0, 4, 4]]


def test_a_wrong_letter_is_named_with_its_place():
    message = refused(FIXED, ["ACG", "AXG"])
    assert message == "the list: sequence 2 ('AXG') has 'X' at position 2; allowed: the letters of 'ACGT'"


@pytest.mark.parametrize("letter", ["a", "N", " ", "\0", "é", "長", "?"])
def test_letters_outside_the_alphabet_are_refused(letter):
    assert f"has {letter!r} at position 3" in refused(FIXED, ["AC" + letter])


def test_a_foreign_letter_is_not_taken_for_a_question_mark():
    environment = SequenceEnvironment(EnvironmentConfig(alphabet="A?", length=2))
    assert environment.tokens(["A?"], origin="o")[0].tolist() == [[0, 1]]
    assert "has 'é' at position 2" in refused(environment, ["Aé"])


@pytest.mark.parametrize(
    ("environment", "sequences", "expected"),
    [
        (FIXED, ["ACG", "AC"], "the list: sequence 2 ('AC') has length 2; allowed: 3"),
        (FIXED, ["ACGT"], "the list: sequence 1 ('ACGT') has length 4; allowed: 3"),
        (VARIABLE, ["AC", "ACG", "A"], "the list: sequence 3 ('A') has length 1; allowed: 2..4"),
        (VARIABLE, ["ACGTA"], "the list: sequence 1 ('ACGTA') has length 5; allowed: 2..4"),
        (FIXED, ["A" * 50], f"the list: sequence 1 ('{'A' * 37}...') has length 50; allowed: 3"),
    ],
)
def test_a_wrong_length_is_named_with_what_is_allowed(environment, sequences, expected):
    assert refused(environment, sequences) == expected


def test_the_end_token_is_a_step_but_no_letter():
    tokens = np.array([[0, 1, 4, 0], [0, 1, 2, 4], [0, 1, 2, 3]], np.int16)
    lengths = VARIABLE.lengths(tokens, np.array([3, 4, 4], np.int16))
    assert lengths.tolist() == [2, 3, 4]
    assert lengths.dtype == np.int16
    assert VARIABLE.sequences(tokens, lengths).tolist() == [b"AC", b"ACG", b"ACGT"]


def test_lengths_of_a_fixed_length_space_are_its_steps():
    assert FIXED.lengths(np.zeros((2, 3), np.int16), np.array([3, 3], np.int16)).tolist() == [3, 3]


def test_actions_that_spell_a_sequence_end_it():
    assert VARIABLE.as_actions(*VARIABLE.tokens(["AC", "TTTT"], origin="o")).tolist() == [[0, 1, 4, 4], [3, 3, 3, 3]]
    assert FIXED.as_actions(*FIXED.tokens(["GAT"], origin="o")).tolist() == [[2, 0, 3]]


def test_min_length_counts_only_where_lengths_vary():
    assert SequenceEnvironment(EnvironmentConfig(length=3, min_length=1)).space.num_sequences == 4**3
    assert VARIABLE.space.num_sequences == 4**2 + 4**3 + 4**4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"alphabet": "A"}, "alphabet.*2 to 64 different printable ASCII"),
        ({"alphabet": "ACCA"}, "alphabet.*2 to 64 different printable ASCII"),
        ({"alphabet": "AÇ"}, "alphabet.*2 to 64 different printable ASCII"),
        ({"alphabet": "A\n"}, "alphabet.*2 to 64 different printable ASCII"),
        ({"alphabet": "".join(map(chr, range(60, 126)))}, "alphabet.*2 to 64 different printable ASCII"),
        ({"alphabet": "A,"}, "alphabet.*blanks, commas, quotes"),
        ({"alphabet": "A>"}, "alphabet.*blanks, commas, quotes"),
        ({"alphabet": "A B"}, "alphabet.*blanks, commas, quotes"),
        ({"length": 0}, "length.*greater than or equal to 1"),
        ({"length": 4097}, "length.*less than or equal to 4096"),
        ({"noise": -0.1}, "noise.*greater than or equal to 0"),
        ({"noise": 1.5}, "noise.*less than or equal to 1"),
        ({"noise": float("nan")}, "noise.*finite"),
        ({"length": 3, "variable_length": True, "min_length": 4}, "min_length 4 is larger than length 3"),
        ({"lenght": 3}, "lenght.*not permitted"),
    ],
)
def test_config_errors_name_the_key_and_what_is_allowed(settings, expected):
    with pytest.raises(ValidationError) as caught:
        EnvironmentConfig(**settings)
    assert re.search(expected, str(caught.value), re.DOTALL)


def test_a_min_length_that_is_not_used_may_be_larger():
    assert EnvironmentConfig(length=3, min_length=4).length == 3
