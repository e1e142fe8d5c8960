"""What the plots show, where it is computed by them."""

import matplotlib.image
import numpy as np
import pytest

from distributed import plots


def test_information_of_letters():
    tokens = np.array([[0, 0, 0], [0, 1, 1], [0, 0, 2], [0, 1, 4]] * 250)  # 4: after the end
    bits = plots.information(tokens, 4)
    assert bits[0] == pytest.approx([2, 0, 0, 0], abs=0.05)  # one count more of each letter
    assert bits[1] == pytest.approx([0.5, 0.5, 0, 0], abs=0.05)
    assert bits[2] == pytest.approx([0.1383, 0.1383, 0.1383, 0], abs=0.02)  # (2 - log2 3) / 3
    assert plots.information(np.full((5, 1), 4), 4).sum() == 0


@pytest.mark.parametrize("alphabet", ["ACGT", "AB", "ACDEFGHIKLMNPQRSTVWY"])
def test_letters_fill_their_columns(tmp_path, alphabet):
    tokens = np.zeros((100, 2), int)
    tokens[:, 1] = np.arange(100) % len(alphabet)
    plots.logos({"all": tokens, "<few>": tokens[:1]}, alphabet, tmp_path / "logo.png")
    picture = matplotlib.image.imread(tmp_path / "logo.png")[..., :3]
    coloured = (np.ptp(picture, axis=-1) > 0.3).sum(0)  # by column of pixels
    left, right = np.array_split(coloured, 2)  # the two panels
    assert left.max() > 0.3 * picture.shape[0]  # a certain letter is as high as the panel
    assert right.max() < left.max()  # of one sequence little is known
