"""From scores to log-rewards, and the schedule of the step size."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from learner.rewards import RewardConfig, log_reward, reward_exponent
from learner.schedules import learning_rate_factor


def test_log_reward_is_the_clamped_power():
    config = RewardConfig(exponent=3, floor=0.01)
    scores = torch.tensor([0.0, 0.005, 0.01, 0.5, 2.0])
    expected = [3 * math.log(max(s, 0.01)) for s in scores.tolist()]
    assert log_reward(scores, config).tolist() == pytest.approx(expected, rel=1e-5)


def test_ramp_rises_from_one_to_the_exponent():
    config = RewardConfig(exponent=5, ramp_steps=10)
    assert [reward_exponent(config, n) for n in (0, 10, 30)] == pytest.approx([1, 3, 4])
    assert reward_exponent(config, 10**9) == pytest.approx(5, abs=1e-6)
    assert reward_exponent(RewardConfig(exponent=5), 0) == 5
    falling = RewardConfig(exponent=0.5, ramp_steps=10)  # a flatter target than the score
    assert reward_exponent(falling, 10) == pytest.approx(0.75)


def test_log_reward_follows_the_ramp_and_ends_at_the_final_reward():
    config, score = RewardConfig(exponent=5, ramp_steps=10), torch.tensor([0.5])
    assert float(log_reward(score, config, step=10)) == pytest.approx(3 * math.log(0.5))
    assert float(log_reward(score, config)) == pytest.approx(5 * math.log(0.5))


@pytest.mark.parametrize("wrong", [{"exponent": 0}, {"floor": 0}, {"floor": 1}, {"ramp_steps": -1}, {"expnent": 2}])
def test_wrong_reward_settings_are_refused(wrong: dict):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        RewardConfig(**wrong)


def test_step_size_warms_up_and_decays_by_a_half_cosine():
    factors = [learning_rate_factor(n, 110, warmup=10, final=0.1) for n in range(121)]
    assert factors[:10] == pytest.approx([(n + 1) / 11 for n in range(10)])
    assert factors[10] == 1
    assert factors[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    assert factors[60] == pytest.approx(0.55)
    assert factors[110:] == pytest.approx([0.1] * 11)
    assert all(a > b for a, b in pairwise(factors[10:111]))


@pytest.mark.parametrize(("total", "warmup"), [(5, 10), (10, 10), (1, 0)])
def test_short_runs_have_a_step_size(total: int, warmup: int):
    factors = [learning_rate_factor(n, total, warmup=warmup, final=0.1) for n in range(total + 1)]
    assert all(0 < f <= 1 for f in factors)
