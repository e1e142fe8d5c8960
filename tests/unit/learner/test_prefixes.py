"""The index of distinct prefixes."""

import numpy as np
import pytest

from actors.environments.noise import UniformSubstitution
from learner.networks.prefixes import group_children, index_prefixes
from learner.space import SequenceSpace
from tests.reference import draw_paths, fixed_space, variable_space

SPACES = [fixed_space(2, 4), fixed_space(4, 3), variable_space(2, 4, 0), variable_space(3, 4, 2)]


def assert_indexed(tokens: np.ndarray, num_steps: np.ndarray, num_actions: int, finished: bool) -> None:
    """Each distinct prefix once, and every prefix of the batch finds its own."""
    steps = tokens.shape[1]
    rows, inverse = index_prefixes(tokens, num_steps, num_actions, finished=finished)
    listed = [tuple(tokens[row // (steps + 1), : row % (steps + 1)].tolist()) for row in rows]
    expected = set()
    for b in range(len(tokens)):
        last = num_steps[b] if finished else num_steps[b] - 1
        for t in range(steps + 1):
            prefix = tuple(tokens[b, :t].tolist()) if t <= last else ()
            assert listed[inverse[b, t]] == prefix
            expected.add(prefix)
    assert listed[0] == ()
    assert len(listed) == len(set(listed))
    assert set(listed) == expected | {()}
    assert rows.dtype == inverse.dtype == np.int64


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 60])
def test_each_distinct_prefix_once(space: SequenceSpace, finished: bool, count: int):
    batch = draw_paths(space, UniformSubstitution(0.25).kernel(space.allowed), count, seed=count)
    assert_indexed(batch.tokens, batch.num_steps, space.num_actions, finished)


def test_equal_sequences_share_all_prefixes():
    tokens = np.tile(np.asarray([[1, 0, 1]], np.int16), (5, 1))
    index = index_prefixes(tokens, np.full(5, 3, np.int16), 2, finished=True)
    assert index.rows.tolist() == [0, 1, 2, 3]
    assert (index.inverse == [0, 1, 2, 3]).all()


def test_tokens_beyond_the_end_do_not_matter():
    tokens = np.asarray([[0, 2, 0, 0], [0, 2, 1, 1]], np.int16)  # 2 ends
    index = index_prefixes(tokens, np.asarray([2, 2], np.int16), 3, finished=True)
    assert len(index.rows) == 3
    assert (index.inverse[0] == index.inverse[1]).all()


def test_an_empty_batch_has_only_the_root():
    index = index_prefixes(np.zeros((0, 3), np.int16), np.zeros(0, np.int16), 4, finished=False)
    assert index.rows.tolist() == [0]
    assert index.inverse.shape == (0, 4)


def test_children_are_merged_by_group_and_token():
    groups, tokens = np.asarray([3, 0, 3, 0, 3]), np.asarray([1, 1, 1, 0, 0])
    first, child = group_children(groups, tokens, 2)
    pairs = list(zip(groups.tolist(), tokens.tolist(), strict=True))
    assert [pairs[first[c]] for c in child] == pairs
    assert len(first) == len(set(pairs))
