"""Ancestral sampling against the exact law, filters, templates and carry-over."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from learner.drakes import exact
from learner.drakes.denoiser import encode
from learner.drakes.filters import FilterConfig, top_k, top_p
from learner.drakes.sampling import draw_reveal_steps, parse_template, plan_rounds, resample, sample
from learner.drakes.schedule import LOG_LINEAR, SCHEDULES
from tests import reference_drakes as reference
from tests.reference_drakes import chi_square, histogram, toy_denoiser

CHI_SQUARE_LIMIT = 340
"""Of 255 degrees of freedom: exceeded with probability 3e-4 by a correct sampler (seeds are fixed)."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return toy_denoiser(4)


@pytest.fixture(scope="module")
def table(model):
    with torch.no_grad():
        return exact.log_prob_table(model)


@pytest.mark.parametrize(
    ("name", "num_steps"), [("log_linear", 1), ("log_linear", 4), ("log_linear", 16), ("cosine", 4)]
)
def test_samples_follow_the_exact_law(model, table, name, num_steps):
    schedule = SCHEDULES[name]
    law, _ = exact.finite_step_law(table, table, num_steps, schedule)
    samples = sample(model, 100_000, num_steps=num_steps, schedule=schedule, generator=seeded())
    assert chi_square(histogram(samples.tokens, 4), law.numpy()) < CHI_SQUARE_LIMIT
    assert samples.reveal_steps.dtype == torch.int16
    assert int(samples.reveal_steps.min()) >= 1
    assert int(samples.reveal_steps.max()) <= num_steps


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("start", [0, 3])
def test_reveal_steps_are_first_successes_of_coins(name, start):
    """False alarm: 1e-4 a case, chi-square with 4 (2) degrees of freedom."""
    masked = torch.ones(20_000, 1, dtype=torch.bool)
    steps = draw_reveal_steps(masked, 5, SCHEDULES[name], seeded(3), start=start)
    coins, survival, law = SCHEDULES[name].unmask_probs(5), 1.0, np.zeros(6)
    for k in range(start or 5, 0, -1):
        law[k] = survival * float(coins[k - 1])
        survival *= 1 - float(coins[k - 1])
    counts = np.bincount(steps[:, 0], minlength=6)
    assert (counts[law == 0] == 0).all()
    assert chi_square(counts[law > 0], law[law > 0]) < (23.5 if start == 0 else 18.4)


@pytest.mark.parametrize("split", [0, 2, 5])
def test_rounds_replay_the_steps(split):
    masked = torch.rand(50, 6, generator=seeded(1)) < 0.8
    steps = draw_reveal_steps(masked, 5, LOG_LINEAR, seeded(2))
    plan = plan_rounds(steps, 5, split=split)
    for row in range(50):
        order = sorted({k for k in steps[row].tolist() if k <= 5}, reverse=True)
        rounds = [plan.rounds[row][steps[row] == k].unique().tolist() for k in order]
        assert all(len(r) == 1 for r in rounds)
        flat = [r[0] for r in rounds]
        assert flat == sorted(set(flat))
        assert all((number < plan.num_early) == (k > split) for number, k in zip(flat, order, strict=True))
        assert (plan.rounds[row][~masked[row]] == -1).all()
    for number in range(plan.num_rounds):
        assert plan.rows(number).tolist() == [r for r in range(50) if number in plan.rounds[r]]
        for row in plan.rows(number).tolist():
            assert int(plan.step_of(number)[row]) == int(steps[row][plan.rounds[row] == number][0])


class _Recorder:
    """A model that records the states it is asked about and, if asked to, lies about their visible positions."""

    def __init__(self, model, *, lies: bool = False):
        self.model, self.lies, self.num_tokens, self.length = model, lies, model.num_tokens, model.length
        self.asked: list[torch.Tensor] = []

    def log_probs(self, states):
        self.asked.append(states.argmax(-1))
        log_probs = self.model.log_probs(states)
        if self.lies:
            nonsense = torch.randn_like(log_probs).mul(50).log_softmax(-1)
            log_probs = torch.where(states[..., -1:] > 0, log_probs, nonsense)
        return log_probs


def test_outputs_at_visible_positions_are_never_read(model):
    honest = sample(model, 500, num_steps=4, generator=seeded(5))
    lied = sample(_Recorder(model, lies=True), 500, num_steps=4, generator=seeded(5))
    assert torch.equal(honest.tokens, lied.tokens)
    assert torch.equal(honest.reveal_steps, lied.reveal_steps)


def test_the_network_is_asked_only_where_something_is_revealed(model):
    recorder = _Recorder(model)
    samples = sample(recorder, 200, num_steps=1000, generator=seeded(6))
    assert len(recorder.asked) <= 4
    assert sum(map(len, recorder.asked)) == sum(len(set(row)) for row in samples.reveal_steps.tolist())


def test_reveal_steps_and_tokens_give_back_the_states(model):
    recorder = _Recorder(model)
    samples = sample(recorder, 1, num_steps=50, generator=seeded(7))
    expected = []
    for k in sorted(set(samples.reveal_steps[0].tolist()), reverse=True):
        expected.append(torch.where(samples.reveal_steps > k, samples.tokens, 4))
    assert torch.equal(torch.cat(recorder.asked), torch.cat(expected))


@pytest.mark.parametrize("logits", [[1.0, 0.5, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 1.0, 0.0], [50.0, 0, 0, 0]])
def test_filters_keep_what_they_should(logits):
    values = torch.tensor([logits])
    for k in range(1, 5):
        assert top_k(values, k)[0].tolist() == reference.top_k(logits, k)
    assert torch.equal(top_k(values, 4), values)
    probs = values.double().softmax(-1)[0].tolist()
    for p in (1e-9, 0.1, 0.3, 0.55, 0.8, 0.98, 1.0):
        kept = torch.isfinite(top_p(values, p)[0]).tolist()
        assert kept == (reference.top_p(probs, p) if p < 1 else [True] * 4)
        assert float(top_p(values, p).softmax(-1).sum()) == pytest.approx(1)
    assert torch.equal(top_p(values, 1.0), values)
    assert torch.isfinite(top_p(values, 1e-9)).sum() == 1
    assert values.argmax() == top_p(values, 1e-9).argmax()


def test_the_token_that_crosses_p_stays():
    values = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert torch.isfinite(top_p(values, 0.6)).tolist() == [True, True, False, False]
    assert torch.isfinite(top_p(values, 0.4)).tolist() == [True, False, False, False]
    assert torch.isfinite(top_k(torch.tensor([1.0, 1.0, 1.0, 0.0]), 2)).tolist() == [True, True, True, False]


def test_filters_act_in_order_and_refuse_nonsense():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    law = FilterConfig(temperature=0.5).apply(logits).softmax(-1)
    expected = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(law, expected / expected.sum())
    assert torch.isfinite(FilterConfig(top_k=2, top_p=0.61).apply(logits)).tolist() == [True, False, False, False]
    for bad in ({"temperature": 0}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            FilterConfig(**bad)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"top_k {k}"):
            top_k(logits, k)
    with pytest.raises(ValueError, match="top_p 0"):
        top_p(logits, 0)


def test_sharpened_samples_follow_their_law(model, table):
    filters = FilterConfig(temperature=0.7, top_k=3, top_p=0.9)
    law, _ = exact.finite_step_law(filters.apply(table).log_softmax(-1).clamp_min(-1e9), table, 4)
    samples = sample(model, 100_000, num_steps=4, filters=filters, generator=seeded(8))
    counts, possible = histogram(samples.tokens, 4), law.numpy() > 1e-12
    assert (counts[~possible] == 0).all()
    assert chi_square(counts[possible], law.numpy()[possible]) < possible.sum() + 4 * math.sqrt(2 * possible.sum())


def test_templates_stay(model, table):
    template = parse_template("ANGN", "ACGT", 4)
    assert template.tolist() == [0, 4, 2, 4]
    samples = sample(model, 50_000, num_steps=16, template=template, generator=seeded(9))
    assert (samples.tokens[:, [0, 2]] == torch.tensor([0, 2])).all()
    assert (samples.reveal_steps[:, [0, 2]] == 17).all()
    first, last = (model.log_probs(encode(template[None], 4)).detach().exp()[0, i].numpy() for i in (1, 3))
    law = np.zeros((4, 4))
    for v in range(4):
        with torch.no_grad():
            then_last = model.log_probs(encode(torch.tensor([[0, v, 2, 4]]), 4)).exp()[0, 3].numpy()
            then_first = model.log_probs(encode(torch.tensor([[0, 4, 2, v]]), 4)).exp()[0, 1].numpy()
        law[v] += 15 / 32 * first[v] * then_last + 1 / 16 * first[v] * last
        law[:, v] += 15 / 32 * last[v] * then_first
    counts = histogram(samples.tokens[:, [1, 3]], 4)
    assert chi_square(counts, law.ravel()) < 44  # 15 degrees of freedom, false alarm 1e-4


def test_a_full_template_is_returned_as_it_is(model):
    samples = sample(model, 3, num_steps=4, template=torch.tensor([0, 1, 2, 3]))
    assert samples.tokens.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ACXN", "'X' at position 3"),
        ("ACGNN", "position 5 is beyond the length 4"),
        ("ACG", "ends after position 3"),
        ("acgn", "'a' at position 1"),
    ],
)
def test_impossible_templates_name_the_position(text, message):
    with pytest.raises(ValueError, match=message):
        parse_template(text, "ACGT", 4)


def test_impossible_tokens_name_the_position(model):
    with pytest.raises(ValueError, match="token 5 at position 2"):
        sample(model, 2, num_steps=4, template=torch.tensor([0, 5, 4, 4]))
    with pytest.raises(ValueError, match="3 positions"):
        sample(model, 2, num_steps=4, template=torch.tensor([0, 4, 4]))
    with pytest.raises(ValueError, match="'N' is a letter"):
        parse_template("ANN", "ANR", 3)
    assert parse_template("AN-", "ANR", 3, free="-").tolist() == [0, 1, 3]


def test_resampling_keeps_the_stated_share(model):
    """False alarm 6e-5: 4 standard errors of 40,000 coins."""
    tokens = torch.zeros(10_000, 4, dtype=torch.int64)
    samples = resample(model, tokens, 0.25, num_steps=8, generator=seeded(10))
    kept = samples.reveal_steps == 9
    assert (samples.tokens[kept] == 0).all()
    assert abs(float(kept.float().mean()) - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 40_000)
    assert int(samples.reveal_steps[~kept].max()) == 2
    assert (samples.tokens != 0).any()
    everything = resample(model, tokens, 1.0, num_steps=8, generator=seeded(11))
    assert (everything.reveal_steps <= 8).all()
    for level in (0, 1.01):
        with pytest.raises(ValueError, match=f"level {level}"):
            resample(model, tokens, level, num_steps=8)


def test_log_probs_are_those_at_the_reveal(model):
    samples = sample(model, 20, num_steps=4, filters=FilterConfig(temperature=0.6), generator=seeded(14))
    for row in range(20):
        for i in range(4):
            state = torch.where(samples.reveal_steps[row] > samples.reveal_steps[row, i], samples.tokens[row], 4)
            with torch.no_grad():
                law = (model.log_probs(encode(state[None], 4))[0, i] / 0.6).log_softmax(-1)
            assert float(samples.log_probs[row, i]) == pytest.approx(float(law[samples.tokens[row, i]]), abs=1e-5)
    given = sample(model, 2, num_steps=4, template=torch.tensor([0, 4, 4, 1]), generator=seeded(15)).log_probs
    assert (given[:, [0, 3]] == 0).all()
    assert (given[:, [1, 2]] < 0).all()
