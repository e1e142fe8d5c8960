"""Every kind of learner takes the steps that it took when tests/golden_curves.json was written."""

import json

import pytest

from tests.golden_curves import CASES, FILE, SECTIONS, TOLERANCE, curves

GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("case", CASES)
def test_curves_are_what_they_were(case):
    found = curves(case)
    assert found.keys() == GOLDEN[case].keys()
    for name, values in GOLDEN[case].items():
        assert found[name] == pytest.approx(values, rel=TOLERANCE, abs=1e-5), name


def test_a_slightly_different_update_is_told_apart(monkeypatch):
    learner = SECTIONS["learner"] | {"learning_rate": 6.1e-3}  # 6e-3 by default
    monkeypatch.setitem(CASES, "without_dynamics", CASES["without_dynamics"] | {"learner": learner})
    assert curves("without_dynamics")["loss"] != pytest.approx(GOLDEN["without_dynamics"]["loss"], rel=TOLERANCE)
