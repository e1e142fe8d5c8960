"""The other strand: involutions, equal results for tokens and one-hots, canonical names."""

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from learner.drakes.reverse_complement import reverse_complement_one_hot, reverse_complement_tokens
from learner.strands import canonical, reverse_complement


def test_a_known_sequence_with_a_mask():
    assert reverse_complement(np.array([0, 1, 2, 3, 4, 0], dtype=np.uint8)).tolist() == [3, 4, 0, 1, 2, 3]


@pytest.mark.parametrize("length", [1, 5, 8])
def test_involution_and_agreement_of_forms(length):
    tokens = np.random.default_rng(length).integers(5, size=(50, length)).astype(np.uint8)
    other = reverse_complement(tokens)
    assert other.dtype == tokens.dtype
    np.testing.assert_array_equal(reverse_complement(other), tokens)
    as_tensor = torch.from_numpy(tokens.astype(np.int64))
    np.testing.assert_array_equal(reverse_complement_tokens(as_tensor), other)
    torch.testing.assert_close(
        reverse_complement_one_hot(one_hot(as_tensor, 5)), one_hot(torch.from_numpy(other.astype(np.int64)), 5)
    )


def test_one_hots_without_a_mask_and_of_other_alphabets():
    x = torch.rand(3, 6, 4)
    torch.testing.assert_close(reverse_complement_one_hot(reverse_complement_one_hot(x)), x, rtol=0, atol=0)
    with pytest.raises(ValueError, match="got 20 channels"):
        reverse_complement_one_hot(torch.rand(3, 6, 20))


def test_the_canonical_form_is_the_smaller_strand():
    tokens = np.random.default_rng(0).integers(4, size=(300, 4))
    expected = [
        min(row, other) for row, other in zip(tokens.tolist(), reverse_complement(tokens).tolist(), strict=True)
    ]
    assert canonical(tokens).tolist() == expected
    np.testing.assert_array_equal(canonical(reverse_complement(tokens)), canonical(tokens))
    assert any(row == other for row, other in zip(tokens.tolist(), reverse_complement(tokens).tolist(), strict=True))
