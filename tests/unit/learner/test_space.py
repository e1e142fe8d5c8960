"""The space of sequences: counts, masks and enumeration against itertools."""

from itertools import product

import numpy as np
import pytest

from learner.space import SequenceSpace
from tests.reference import fixed_space, variable_space

SPACES = [
    fixed_space(2, 1),
    fixed_space(4, 3),
    variable_space(2, 3, 0),
    variable_space(3, 3, 2),
    variable_space(2, 4, 4),
]


def all_sequences(space: SequenceSpace) -> list[tuple[int, ...]]:
    shortest = space.min_length if space.variable_length else space.max_length
    return [s for n in range(shortest, space.max_length + 1) for s in product(range(space.num_tokens), repeat=n)]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_enumeration_lists_each_sequence_once_shorter_first(space: SequenceSpace):
    tokens, lengths = space.enumerate()
    listed = [tuple(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)]
    assert listed == all_sequences(space)
    assert space.num_sequences == len(listed)
    assert (tokens[np.arange(space.max_length) >= lengths[:, None]] == 0).all()


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_completions_are_counted(space: SequenceSpace):
    sequences = all_sequences(space)
    for depth in range(space.max_length + 1):
        below = sum(s[:depth] == (0,) * depth for s in sequences)  # every prefix of a depth has as many as this one
        assert np.exp(space.log_num_completions[depth]) == pytest.approx(below, rel=1e-5)


def test_end_is_allowed_from_the_least_length_on():
    assert fixed_space(4, 3).allowed.tolist() == [[True] * 4] * 3
    assert variable_space(2, 3, 2).allowed[:, 2].tolist() == [False, False, True]
    assert variable_space(2, 3, 0).allowed.all()
    assert variable_space(2, 3, 3).allowed[:, 2].tolist() == [False] * 3


def test_end_is_the_last_action_of_a_variable_space_only():
    assert (variable_space(4, 3, 1).num_actions, variable_space(4, 3, 1).end) == (5, 4)
    assert fixed_space(4, 3).num_actions == 4


def test_number_of_sequences_is_exact_where_floats_are_not():
    assert fixed_space(20, 60).num_sequences == 20**60
    assert np.isfinite(fixed_space(20, 60).log_num_completions).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_tokens": 1, "max_length": 3},
        {"num_tokens": 2, "max_length": 0},
        {"num_tokens": 2, "max_length": 3, "variable_length": True, "min_length": 4},
        {"num_tokens": 2, "max_length": 3, "variable_length": True, "min_length": -1},
    ],
)
def test_impossible_spaces_are_refused(wrong: dict):
    with pytest.raises(ValueError, match=r"num_tokens >= 2|min_length must lie"):
        SequenceSpace(**wrong)
