"""The buffer of masked diffusion: what its memory bank begins with."""

import numpy as np
import pytest

from actors.design_buffer import DesignBuffer
from actors.replay_buffer import ReplayConfig
from actors.trajectories import trajectories_of


@pytest.mark.parametrize("num_banked", [0, 3])
def test_the_bank_begins_with_offline_sequences_if_members_are_drawn(num_banked):
    buffer = DesignBuffer(ReplayConfig(), 4, seed=0, num_actions=6, num_banked=num_banked)
    offline = trajectories_of(np.array([[0, 0, 0, 1], [0, 0, 0, 2], [1, 0, 0, 0]]))
    offline.scores[:] = [0.5, 0.9, np.nan]
    buffer.set_offline(offline)
    assert buffer.num_offline == 0  # the learner has them
    assert buffer.bank.all().rewards.tolist() == pytest.approx([0.9, 0.5] if num_banked else [])
    drawn = buffer.draw(2, 0).banked
    assert (drawn is None) == (num_banked == 0)
    if drawn is not None:
        assert drawn.scores.tolist() == pytest.approx([0.9] * 3)  # the other one does not beat the mean
