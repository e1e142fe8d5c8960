"""A user's function as oracle: scores, cache and batches, faults of the function, and its process."""

import json
import textwrap

import numpy as np
import pytest
from pydantic import ValidationError

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.oracles.base import OracleError
from actors.oracles.callable import CallableOracle, CallableOracleConfig

ENVIRONMENT = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=4))
ALL = [s.decode() for s in ENVIRONMENT.sequences(*ENVIRONMENT.space.enumerate())]
COUNT_T = "[s.count('T') for s in sequences]"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Builds an oracle from the body of `score(sequences)`, which finds `calls`, a file with a line for each call."""
    monkeypatch.syspath_prepend(tmp_path)
    oracles = []

    def build(body: str, *, header: str = "", environment=ENVIRONMENT, **settings) -> CallableOracle:
        text = "import json, os, sys, time\n" + textwrap.dedent(header) + "\n\ndef score(sequences):\n"
        text += f"    with open({str(tmp_path / 'calls')!r}, 'a') as file:\n"
        text += "        file.write(json.dumps(sequences) + '\\n')\n"
        (tmp_path / "scorer.py").write_text(text + textwrap.indent(textwrap.dedent(body), "    "))
        config = CallableOracleConfig(name="callable", function="scorer:score", **settings)
        oracles.append(CallableOracle(config, environment))
        return oracles[-1]

    yield build
    for oracle in oracles:
        oracle.close()


@pytest.fixture
def calls(tmp_path):
    """What the function was asked, call by call."""
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def ask(oracle: CallableOracle, sequences: list[str], environment=ENVIRONMENT) -> list[float]:
    scores = oracle.score(*environment.tokens(sequences, origin="test"))
    assert scores.dtype == np.float32
    return scores.tolist()


def unscored(oracle: CallableOracle, sequences: list[str]) -> list[str]:
    """The sequences without a score; the others must have the number of their T."""
    scores = ask(oracle, sequences)
    assert [score for score in scores if score == score] == [
        s.count("T") for s, score in zip(sequences, scores, strict=True) if score == score
    ]
    return [s for s, score in zip(sequences, scores, strict=True) if score != score]


def test_scores_come_in_the_order_of_the_batch(make):
    oracle = make(f"return {COUNT_T}")
    assert ask(oracle, ["TTTT", "ACGT", "AAAA", "TTAA"]) == [4, 1, 0, 2]
    assert unscored(oracle, ALL[::-1]) == []
    assert not oracle.enumerable
    assert oracle.reference is None


def test_sequences_of_varying_length_are_sent_without_their_end(make, calls):
    environment = SequenceEnvironment(EnvironmentConfig(length=4, variable_length=True, min_length=0))
    oracle = make("return [len(s) for s in sequences]", environment=environment)
    tokens = np.array([[0, 1, 4, 0], [0, 0, 0, 4], [4, 0, 0, 0], [3, 3, 3, 3]])
    assert oracle.score(tokens, np.array([2, 3, 0, 4])).tolist() == [2, 3, 0, 4]
    assert sorted(calls()[0]) == ["", "AAA", "AC", "TTTT"]


@pytest.mark.parametrize(
    "result", ["map(float, range(n))", "__import__('array').array('f', range(n))", "tuple(range(n))"]
)
def test_scores_may_be_any_iterable_of_numbers(make, result):
    oracle = make(f"n = len(sequences)\nreturn {result}")
    assert ask(oracle, ["AAAA", "CCCC", "GGGG"]) == [0, 1, 2]


def test_repeated_sequences_are_asked_only_once(make, calls):
    oracle = make(f"return {COUNT_T}")
    assert ask(oracle, ["AAAT", "TTTT", "AAAT", "AAAT"]) == [1, 4, 1, 1]
    assert ask(oracle, ["TTTT", "CCCT"]) == [4, 1]
    assert ask(oracle, ["AAAT", "CCCT"]) == [1, 1]
    assert calls() == [["AAAT", "TTTT"], ["CCCT"]]
    assert oracle.num_calls == 2


def test_without_a_cache_only_one_batch_knows_its_repetitions(make, calls):
    oracle = make(f"return {COUNT_T}", cache_size=0)
    for _ in range(2):
        assert ask(oracle, ["TTTT", "AAAA", "TTTT"]) == [4, 0, 4]
    assert calls() == [["AAAA", "TTTT"]] * 2


def test_the_least_recently_used_score_is_forgotten(make, calls):
    oracle = make(f"return {COUNT_T}", cache_size=2)
    for sequence in ("AAAA", "CCCC", "AAAA", "GGGG", "AAAA", "CCCC"):
        assert ask(oracle, [sequence]) == [0]
    assert calls() == [["AAAA"], ["CCCC"], ["GGGG"], ["CCCC"]]


def test_no_call_holds_more_than_batch_size(make, calls):
    oracle = make(f"return {COUNT_T}", batch_size=100)
    assert unscored(oracle, ALL) == []
    assert [len(call) for call in calls()] == [100, 100, 56]
    assert [s for call in calls() for s in call] == sorted(ALL)
    assert oracle.num_calls == 3


def test_large_batches_pass_through_the_pipes(make):
    environment = SequenceEnvironment(EnvironmentConfig(length=100))
    oracle = make("return [s.count('T') for s in sequences]", environment=environment, batch_size=10_000)
    tokens = np.random.default_rng(0).integers(4, size=(5000, 100))
    np.testing.assert_array_equal(oracle.score(tokens, np.full(5000, 100)), (tokens == 3).sum(1))
    assert oracle.num_calls == 1


@pytest.mark.parametrize("poison", ["AAAA", "GATT", "TTTT"])
def test_one_poison_sequence_alone_has_no_score(make, caplog, poison):
    oracle = make(f"if {poison!r} in sequences:\n    raise ValueError('bad one')\nreturn {COUNT_T}")
    assert unscored(oracle, ALL) == [poison]
    assert "oracle scorer:score failed on 256 sequences: ValueError: bad one" in caplog.messages
    assert unscored(oracle, ["ACGT", poison, "TTTG"]) == [poison]


def test_neighbours_that_fail_do_not_end_the_run(make):
    """Batches are sorted, so sequences with one prefix fail one after another; 240 of 256 can be scored."""
    oracle = make(f"if any(s.startswith('AA') for s in sequences):\n    raise ValueError('AA')\nreturn {COUNT_T}")
    assert unscored(oracle, ALL) == [s for s in ALL if s.startswith("AA")]


def test_a_failure_that_passes_is_retried(make, calls):
    header = "failures = iter([True, True, False])"
    oracle = make(f"if next(failures, False):\n    raise OSError('busy')\nreturn {COUNT_T}", header=header)
    assert unscored(oracle, ALL) == []
    assert [len(call) for call in calls()] == [256] * 3


def test_a_function_that_always_raises_is_given_up_with_the_cause(make, calls):
    oracle = make("raise KeyError('no model file')", max_retries=9, max_consecutive_failures=5)
    with pytest.raises(OracleError, match=r"oracle scorer:score failed 5 times in a row; last: KeyError: 'no model"):
        ask(oracle, ALL)
    assert len(calls()) == 5


def test_failures_in_a_row_are_counted_over_batches_and_forgotten_by_a_success(make):
    oracle = make(
        f"if 'AAAA' in sequences:\n    raise ValueError\nreturn {COUNT_T}",
        max_retries=0, max_consecutive_failures=3, cache_size=0,
    )  # fmt: skip
    for _ in range(2):
        for _ in range(2):
            assert np.isnan(ask(oracle, ["AAAA"])).all()
        assert ask(oracle, ["TTTT"]) == [4]
    ask(oracle, ["AAAA"])
    ask(oracle, ["AAAA"])
    with pytest.raises(OracleError, match="failed 3 times in a row"):
        ask(oracle, ["AAAA"])


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("[1.0] * (len(sequences) + 1)", "it returned 3 scores for 2 sequences"),
        ("[]", "it returned 0 scores for 2 sequences"),
        ("None", "TypeError: 'NoneType' object is not iterable"),
        ("['high'] * len(sequences)", "ValueError: could not convert string to float: 'high'"),
    ],
)
def test_an_answer_of_another_form_is_a_failure_that_says_why(make, result, reason):
    oracle = make(f"return {result}", max_consecutive_failures=2)
    with pytest.raises(OracleError) as caught:
        ask(oracle, ["AAAA", "TTTT"])
    assert str(caught.value) == f"oracle scorer:score failed 2 times in a row; last: {reason}"


def test_no_score_passes_through_and_is_asked_again(make, calls):
    oracle = make("return [float('nan') if s == 'AAAA' else float('inf') for s in sequences]")
    for _ in range(2):
        np.testing.assert_array_equal(ask(oracle, ["AAAA", "TTTT"]), [np.nan, np.inf])
    assert calls() == [["AAAA", "TTTT"], ["AAAA"]]


def test_no_score_takes_no_place_in_the_cache(make, calls):
    oracle = make("return [float('nan') if s == 'AAAA' else 1.0 for s in sequences]", cache_size=1)
    for sequence in ("TTTT", "AAAA", "TTTT"):
        ask(oracle, [sequence])
    assert calls() == [["TTTT"], ["AAAA"]]


def test_output_of_the_function_disturbs_nothing(make, capfd):
    header = "print('loading', flush=True)\nos.system('echo from a shell')"
    body = (
        f"print('x' * 100_000)\nsys.stdout.flush()\nos.write(1, b'{{}}\\n')\nos.system('echo again')\nreturn {COUNT_T}"
    )
    oracle = make(body, header=header)
    assert unscored(oracle, ALL) == []
    out, err = capfd.readouterr()
    assert out == ""
    assert "loading" in err
    assert "from a shell" in err


def test_config_errors_name_the_key():
    for settings, key in (
        ({"function": "scorer"}, "allowed: package.module:function"),
        ({"function": "a b:score"}, "allowed: package.module:function"),
        ({"function": "scorer:"}, "allowed: package.module:function"),
        ({"batch_size": 0}, "batch_size"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"max_consecutive_failures": 0}, "max_consecutive_failures"),
        ({"retries": 1}, "retries"),
    ):
        with pytest.raises(ValidationError, match=key):
            CallableOracleConfig(**({"name": "callable", "function": "scorer:score"} | settings))
