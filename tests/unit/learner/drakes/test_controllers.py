"""Alpha and learning rates: closed forms, bounds, convergence, and going on from a saved state."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from learner.drakes.controllers import AlphaConfig, AlphaController, make_scheduler

TOTAL = 40


def controller(low: float = 0.0, high: float = 1.0, **settings: Any) -> AlphaController:
    return AlphaController(AlphaConfig(**settings), reward_low=low, reward_high=high)


def test_kl_mode_multiplies_by_a_clipped_power():
    held = controller(initial=0.1, kl_target=2.0, kl_rate=0.2)
    assert held.update(kl=2.5, mean_reward=0) == pytest.approx(0.1 * math.exp(0.2 * 0.25))
    assert held.update(kl=math.inf, mean_reward=0) == pytest.approx(0.1 * math.exp(0.2 * 0.75))
    assert held.update(kl=0.0, mean_reward=0) == pytest.approx(0.1 * math.exp(0.2 * 0.25))


@pytest.mark.parametrize("start", [1e-3, 0.3, 9.0])
def test_kl_mode_converges_where_kl_falls_with_alpha(start):
    held, scale = controller(initial=start, kl_target=4.0, minimum=1e-4, maximum=10.0), 1.0
    for _ in range(400):
        held.update(kl=scale / held.alpha, mean_reward=0)
    assert scale / held.alpha == pytest.approx(4.0, rel=1e-3)


def test_reward_mode_is_the_share_of_the_way():
    held = controller(low=1.0, high=3.0, mode="reward", initial=0.2, minimum=0.01, maximum=5.0)
    assert held.update(kl=0, mean_reward=3.0) == pytest.approx(0.2)
    assert held.update(kl=0, mean_reward=2.0) == pytest.approx(0.4)
    assert held.update(kl=0, mean_reward=5.0) == pytest.approx(0.1)
    assert held.update(kl=0, mean_reward=1.0) == 5.0


@pytest.mark.parametrize("mode", ["kl", "reward", "fixed"])
@pytest.mark.parametrize("value", [-10.0, 0.0, 1e9])
def test_alpha_stays_finite_and_within_bounds(mode, value):
    held = controller(mode=mode, initial=0.5, minimum=0.2, maximum=2.0)
    for _ in range(200):
        assert 0.2 <= held.update(kl=max(value, 0), mean_reward=value) <= 2.0
    assert mode != "fixed" or held.alpha == 0.5


def test_alpha_is_monotone_in_what_it_reads():
    values = [-10.0, -1.0, 0.0, 0.2, 1.0, 1.5, 3.0, 100.0]
    by_reward = [controller(mode="reward").update(kl=0, mean_reward=v) for v in values]
    assert by_reward == sorted(by_reward, reverse=True)
    assert by_reward[0] > by_reward[-1]
    by_kl = [controller(kl_target=1.0).update(kl=max(v, 0), mean_reward=0) for v in values]
    assert by_kl == sorted(by_kl)
    assert by_kl[0] < by_kl[-1]


def test_warm_up_is_linear_and_adjusts_nothing():
    held = controller(initial=1.0, warmup_updates=4, kl_target=1.0)
    seen = [held.alpha] + [held.update(kl=100.0, mean_reward=0) for _ in range(5)]
    assert seen[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert seen[5] == pytest.approx(math.exp(0.05))


def test_alpha_goes_on_from_a_saved_state():
    held, other = controller(warmup_updates=3), controller(warmup_updates=3)
    for kl in (1.0, 9.0, 2.0, 7.0):
        held.update(kl=kl, mean_reward=0)
    other.load_state_dict(held.state_dict())
    assert other.alpha == held.alpha
    assert other.update(kl=5.0, mean_reward=0) == held.update(kl=5.0, mean_reward=0)


def test_unusable_settings_and_measurements_are_refused():
    with pytest.raises(ValueError, match="reward_low < reward_high"):
        controller(low=1.0, high=1.0, mode="reward")
    with pytest.raises(ValueError, match="reward_low < reward_high"):
        AlphaController(AlphaConfig(mode="reward"))
    with pytest.raises(ValidationError, match="must lie between minimum"):
        AlphaConfig(initial=20.0)
    with pytest.raises(ValueError, match=r"alpha\.mode kl: the measured value is NaN"):
        controller().update(kl=math.nan, mean_reward=0)


def trace(name: Any, steps: int = TOTAL + 20, metric: Any = lambda step: 0.0, **settings: Any) -> list[float]:
    """Learning rate at every step, an evaluation after each."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=0.5)
    schedule, rates = make_scheduler(name, optimiser, TOTAL, **settings), []
    for step in range(steps):
        rates.append(float(optimiser.param_groups[0]["lr"]))
        optimiser.step()
        schedule.on_step()
        schedule.on_eval(metric(step))
    return rates


def test_cosine_is_its_closed_form_and_then_stays():
    expected = [0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * min(t, TOTAL) / TOTAL)) / 2) for t in range(TOTAL + 20)]
    assert trace("cosine", final_share=0.1) == pytest.approx(expected)


def test_onecycle_rises_falls_and_then_stays():
    peak = 0.25 * TOTAL - 1
    rates = trace("onecycle", warmup_share=0.25)

    def between(start: float, end: float, share: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    for t, rate in enumerate(rates):
        if t <= peak:
            assert rate == pytest.approx(between(0.5 / 25, 0.5, t / peak))
        else:
            share = (min(t, TOTAL - 1) - peak) / (TOTAL - 1 - peak)
            assert rate == pytest.approx(between(0.5, 0.5 / 25e4, share))


def test_plateau_halves_when_the_metric_stands_still():
    rates = trace("plateau", metric=lambda step: min(step, 10), patience=2)
    assert rates[:14] == [0.5] * 14
    assert rates[14:20] == [0.25] * 3 + [0.125] * 3
    assert trace("plateau", metric=lambda step: 0.1 * step, patience=1)[-1] == 0.5
    assert min(trace("plateau", patience=0, final_share=0.3)) == 0.15


def test_a_falling_negative_metric_is_no_progress():
    assert trace("plateau", steps=8, metric=lambda step: -10 - 0.001 * step, patience=2)[-1] < 0.5


def test_constant_stays_and_unknown_names_are_refused():
    assert trace("constant") == [0.5] * (TOTAL + 20)
    with pytest.raises(ValueError, match="got 'linear'; allowed: onecycle"):
        trace("linear")
    with pytest.raises(ValueError, match="total_steps: got 1"):
        make_scheduler("cosine", torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 1)


@pytest.mark.parametrize("name", ["onecycle", "cosine", "plateau", "constant"])
def test_a_schedule_goes_on_from_a_saved_state(name):
    optimisers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5) for _ in range(2)]
    first, second = (make_scheduler(name, optimiser, TOTAL, patience=2) for optimiser in optimisers)

    def rates(schedule: Any, optimiser: torch.optim.Optimizer, steps: int) -> list[float]:
        seen = []
        for _ in range(steps):
            optimiser.step()
            schedule.on_step()
            schedule.on_eval(1.0)
            seen.append(float(optimiser.param_groups[0]["lr"]))
        return seen

    rates(first, optimisers[0], 15)
    optimisers[1].load_state_dict(optimisers[0].state_dict())
    second.load_state_dict(first.state_dict())
    assert rates(second, optimisers[1], 20) == rates(first, optimisers[0], 20)
