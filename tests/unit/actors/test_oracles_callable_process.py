"""The process of a user's function: hangs, deaths, functions that cannot be loaded, and that nothing is left behind."""

import gc
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.oracles import callable as callable_oracle
from actors.oracles.base import OracleDataError, OracleError
from actors.oracles.callable import CallableOracle, CallableOracleConfig

ENVIRONMENT = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=2))
ALL = [s.decode() for s in ENVIRONMENT.sequences(*ENVIRONMENT.space.enumerate())]
COUNT_T = "[s.count('T') for s in sequences]"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Builds an oracle from the text of a module that holds `score`."""
    monkeypatch.syspath_prepend(tmp_path)
    oracles = []

    def build(text: str, *, function: str = "scorer:score", **settings) -> CallableOracle:
        (tmp_path / "scorer.py").write_text("import os, signal, subprocess, sys, time\n" + text)
        settings = {"max_retries": 0, "timeout_seconds": 30} | settings
        config = CallableOracleConfig(name="callable", function=function, **settings)
        oracles.append(CallableOracle(config, ENVIRONMENT))
        return oracles[-1]

    yield build
    for oracle in oracles:
        oracle.close()


def function(body: str) -> str:
    return "def score(sequences):\n" + textwrap.indent(textwrap.dedent(body), "    ") + f"\n    return {COUNT_T}\n"


def unscored(oracle: CallableOracle, sequences: list[str]) -> list[str]:
    """The sequences without a score; the others must have the number of their T."""
    scores = oracle.score(*ENVIRONMENT.tokens(sequences, origin="test"))
    counts = np.array([s.count("T") for s in sequences])
    np.testing.assert_array_equal(scores[~np.isnan(scores)], counts[~np.isnan(scores)])
    return [s for s, score in zip(sequences, scores, strict=True) if np.isnan(score)]


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def workers() -> list[int]:
    """Process ids of the functions that this test started."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if running(child.pid) and "scorer" in " ".join(child.cmdline())]


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_the_process_ends_with_the_oracle(make):
    oracle = make(function(""))
    assert len(workers()) == 1
    assert unscored(oracle, ALL) == []
    oracle.close()
    assert workers() == []
    oracle.close()


def test_a_call_that_hangs_is_stopped_in_time_and_has_no_scores(make, caplog):
    oracle = make(function("if 'GA' in sequences:\n    time.sleep(100)"), timeout_seconds=0.3)
    (pid,) = workers()
    start = time.monotonic()
    assert unscored(oracle, ALL) == ALL
    assert 0.3 <= time.monotonic() - start < 5
    assert not running(pid)
    assert caplog.messages == ["oracle scorer:score failed on 16 sequences: no answer within 0.3 s"]
    assert unscored(oracle, [s for s in ALL if s != "GA"]) == []
    assert unscored(oracle, ["GA", "TT"]) == ["GA"]
    oracle.close()
    assert workers() == []


def test_a_call_that_hangs_once_is_retried(make, tmp_path):
    mark = str(tmp_path / "came")
    body = f"if not os.path.exists({mark!r}):\n    open({mark!r}, 'w').close()\n    time.sleep(100)"
    oracle = make(function(body), timeout_seconds=0.3, max_retries=1)
    assert unscored(oracle, ALL) == []
    assert oracle.num_calls == 2


def test_hangs_are_failures_too(make):
    oracle = make(function("time.sleep(100)"), timeout_seconds=0.2, max_retries=5, max_consecutive_failures=2)
    with pytest.raises(
        OracleError, match=r"oracle scorer:score failed 2 times in a row; last: no answer within 0\.2 s"
    ):
        unscored(oracle, ALL)
    assert workers() == []


def test_a_slow_call_within_its_time_is_waited_for(make):
    oracle = make(function("time.sleep(0.3)"), timeout_seconds=20)
    assert unscored(oracle, ALL) == []


@pytest.mark.parametrize(
    ("death", "code"), [("os._exit(3)", 3), ("sys.exit(4)", 4), ("os.kill(os.getpid(), signal.SIGKILL)", -9)]
)
def test_a_sequence_that_kills_the_process_alone_has_no_score(make, caplog, death, code):
    oracle = make(function(f"if 'GA' in sequences:\n    {death}"))
    assert unscored(oracle, ALL) == ["GA"]
    assert f"oracle scorer:score failed on 16 sequences: its process ended with exit code {code}" in caplog.messages
    assert unscored(oracle, ["CT", "GA"]) == ["GA"]
    oracle.close()
    assert workers() == []


def test_a_process_killed_between_two_calls_is_started_anew(make, caplog):
    oracle = make(function(""))
    (pid,) = workers()
    psutil.Process(pid).kill()
    assert soon(lambda: not running(pid))
    assert unscored(oracle, ALL) == []
    assert not caplog.messages
    assert workers() != [pid]


def test_restarts_leave_no_open_files(make, monkeypatch):
    monkeypatch.setattr(callable_oracle.logger, "disabled", True)  # pytest keeps what is logged, and its tracebacks
    oracle = make(function("os._exit(1)"), max_consecutive_failures=100)
    unscored(oracle, ["AA"])
    gc.collect()
    before = psutil.Process().num_fds()
    for _ in range(8):
        assert unscored(oracle, ["AA"]) == ["AA"]
    gc.collect()
    assert psutil.Process().num_fds() <= before


def test_a_function_that_cannot_be_loaded_again_is_a_failure(make, tmp_path):
    oracle = make(function("os._exit(1)"), max_retries=9, max_consecutive_failures=2)
    (tmp_path / "scorer.py").write_text("raise ImportError('model gone')")
    with pytest.raises(OracleError, match="failed 2 times in a row; last: ImportError: model gone"):
        unscored(oracle, ["AA"])
    assert workers() == []


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ("", "scorer_that_is_missing:score", "ModuleNotFoundError: No module named 'scorer_that_is_missing'"),
        ("", "scorer.inner:score", "ModuleNotFoundError: No module named 'scorer.inner'"),
        ("def other(s): pass", "scorer:score", "AttributeError: module 'scorer' has no attribute 'score'"),
        ("def score(s) pass", "scorer:score", "SyntaxError: "),
        ("raise OSError('no model file')", "scorer:score", "OSError: no model file"),
        ("sys.exit(5)", "scorer:score", "its process ended with exit code 5"),
        ("os._exit(6)", "scorer:score", "its process ended with exit code 6"),
        ("score = 3", "scorer:score", "callable"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_an_error_at_once(make, text, name, reason):
    with pytest.raises(OracleDataError) as caught:
        make(text, function=name)
    assert str(caught.value).startswith(f"oracle.function: {name}: ")
    assert reason in str(caught.value)
    assert soon(lambda: workers() == [])


def test_a_function_that_takes_too_long_to_load_is_an_error(make, monkeypatch):
    monkeypatch.setattr(callable_oracle, "STARTUP_SECONDS", 0.3)
    with pytest.raises(OracleDataError, match=r"oracle\.function: scorer:score: no answer within 0\.3 s"):
        make("time.sleep(100)")
    assert workers() == []


@pytest.mark.parametrize("end", ["child.wait()", "os._exit(1)"])
def test_programs_that_the_function_started_end_with_it(make, tmp_path, end):
    """A call that hangs in another program, or dies beside one, is stopped together with that program."""
    file = str(tmp_path / "pid")
    body = f"child = subprocess.Popen(['sleep', '100'])\nopen({file!r}, 'w').write(str(child.pid))\n{end}"
    oracle = make(function(body), timeout_seconds=1)
    assert unscored(oracle, ["AA"]) == ["AA"]
    child = int((tmp_path / "pid").read_text())
    try:
        oracle.close()
        assert soon(lambda: not running(child))
    finally:
        if running(child):
            psutil.Process(child).kill()


@pytest.mark.parametrize("end", ["child.wait()", "os._exit(1)"])
def test_programs_of_a_failed_call_are_gone_when_the_next_one_succeeds(make, tmp_path, end):
    file = str(tmp_path / "pid")
    start = f"child = subprocess.Popen(['sleep', '100'])\nopen({file!r}, 'w').write(str(child.pid))\n{end}"
    oracle = make(function("if 'GA' in sequences:\n" + textwrap.indent(start, "    ")), timeout_seconds=1)
    assert unscored(oracle, ["GA"]) == ["GA"]
    assert unscored(oracle, ["TT"]) == []
    child = int((tmp_path / "pid").read_text())
    try:
        assert soon(lambda: not running(child))
    finally:
        if running(child):
            psutil.Process(child).kill()


def test_the_process_ends_when_its_owner_died(tmp_path):
    (tmp_path / "scorer.py").write_text(f"def score(sequences):\n    return {COUNT_T}\n")
    program = """
        import os, sys
        import psutil
        from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
        from actors.oracles.callable import CallableOracle, CallableOracleConfig
        sys.path.insert(0, sys.argv[1])
        environment = SequenceEnvironment(EnvironmentConfig(length=2))
        oracle = CallableOracle(CallableOracleConfig(name="callable", function="scorer:score"), environment)
        (worker,) = psutil.Process().children()
        print(worker.pid, oracle.score(*environment.tokens(["TT"], origin="o"))[0], flush=True)
        os.kill(os.getpid(), 9)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    pid, score = done.stdout.split()
    assert (done.returncode, score) == (-9, "2.0")
    assert soon(lambda: not running(int(pid)))


def test_a_slow_sequence_holds_up_only_its_own_process(make, tmp_path):
    """GA is answered only once all the other calls were made."""
    wait = f"while not os.path.exists({str(tmp_path / 'go')!r}):\n        time.sleep(0.01)"
    oracle = make(function(f"if 'GA' in sequences:\n    {wait}"), num_processes=2, batch_size=1, cache_size=0)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(unscored, oracle, ["GA", "TT"])
        assert soon(lambda: oracle.num_calls == 2)
        for count in range(5):  # as the next batches of the same actor
            assert unscored(oracle, ["TA", "TC"]) == [], count
        assert not first.done()
        assert len(workers()) == 2
        (tmp_path / "go").touch()
        assert first.result(10) == []


def test_sequences_are_dealt_to_all_processes(make, tmp_path):
    log = str(tmp_path / "log")
    oracle = make(
        function(f"open({log!r}, 'a').write(f'{{os.getpid()}} {{len(sequences)}}\\n')\ntime.sleep(0.3)"),
        num_processes=3,
    )
    assert len(workers()) == 1
    assert unscored(oracle, ALL) == []
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(int(count) for _, count in lines) == [4, 6, 6]
    assert len({pid for pid, _ in lines}) == len(workers()) == 3
    oracle.close()
    assert workers() == []


def test_an_oracle_that_is_closed_stops_the_call_under_way(make):
    oracle = make(function("time.sleep(100)"), timeout_seconds=90, max_retries=3)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(unscored, oracle, ["GA"])
        assert soon(lambda: oracle.num_calls == 1)
        start = time.monotonic()
        oracle.close()
        with pytest.raises(OracleError, match="scorer:score was closed"):
            call.result(10)
    assert time.monotonic() - start < 10
    assert workers() == []


def test_oracles_on_one_node_share_their_scores_until_the_function_changes(make, tmp_path):
    shared = tmp_path / "cache"
    one, two = (make(function(""), cache_folder=shared) for _ in range(2))
    assert unscored(one, ALL) == []
    assert unscored(two, ALL) == []
    assert (one.num_calls, two.num_calls) == (1, 0)
    forgetful = make(function(""), cache_folder=shared, cache_size=0)
    assert unscored(forgetful, ALL) == []
    assert forgetful.num_calls == 0
    changed = make(function("") + "# another version\n", cache_folder=shared)
    assert unscored(changed, ALL) == []
    assert changed.num_calls == 1
    assert len(list(shared.glob("scorer.score-*.sqlite"))) == 2
