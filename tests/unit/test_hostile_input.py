"""Files, names and addresses made to do harm: each is refused in time, in little memory, with nothing run or written."""

import os
import pickle  # noqa: TID251 - to write what no reader here may run
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.oracles import table
from actors.oracles.base import OracleDataError
from actors.oracles.table import CsvOracleConfig, NpyOracleConfig, csv_oracle, npy_oracle
from distributed import attention, evaluate, ray_token, run, sample, sweep
from distributed.compare import write_csv
from distributed.config import DEFAULT_CONFIG, ConfigError, load_config, read_yaml, validate
from distributed.experiment import check_memory
from distributed.run_folder import RunFolder
from distributed.search_space import Domain, draw_points
from distributed.sweep_config import load_sweep
from distributed.yaml_text import parse_yaml
from tests.hostile import Trap, bomb, frugal, npy  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("frugal")
ENVIRONMENT = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=3))


def refused(text: str | bytes, folder: Path) -> str:
    """The message with which a config file of this text is refused."""
    file = folder / "c.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert len(str(caught.value)) < 10_000
    return str(caught.value)


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: !!python/object/apply:os.mkdir [sprung]", "could not determine a constructor for the tag"),
        ("run: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("run: !mine {seed: 1}", "could not determine a constructor for the tag"),
        (bomb(10), "aliases"),
        ("run: &a {name: *a}", "aliases"),
        ("run: {name: " + "[" * 100_000, "at most 50 levels are allowed"),
        ("run: " + "{a: " * 100_000, "at most 50 levels are allowed"),
        ("run: {seed: 1, seed: 2}", "'seed' is there twice at line 1, column 16"),
        ("run: {seed: 1}\nrun: {name: x}", "'run' is there twice at line 2, column 1"),
        ("1: {seed: 1}", "a key must be a text"),
        ("run: {null: 1}", "a key must be a text"),
        ("run: {[a]: 1}", "a key must be a text"),
        ("run: {{a: 1}: 1}", "a key must be a text"),
        ("[run]", "a config is a mapping of sections"),
        ("run", "a config is a mapping of sections"),
        ("run: {}\n---\nrun: {}", "expected a single document"),
        ("run: {name: a\0b}", "special characters are not allowed"),
        (b"run: {name: \xff\xfe}", "'utf-8' codec can't decode"),
        ("run: {name: x}" + " " * 1_000_000, "larger than 1,000,000 bytes"),
        ("run: {seed: " + "9" * 5000 + "}", "integers of 64 bits"),
        ("run: {seed: 0x" + "f" * 500_000 + "}", "integers of 64 bits"),
        ("run: {seed: 1" + ":1" * 200_000 + "}", "integers of 64 bits"),
        ("learner: {learning_rate: 1e400}", "learner.learning_rate: got '1e400'; input should be a finite number"),
        ("learner: {learning_rate: 1.0e+400}", "learner.learning_rate: got inf; input should be a finite number"),
        ("learner: {learning_rate: .nan}", "learner.learning_rate: got nan; input should be a finite number"),
        ("evaluation: {mode_cutoff: .inf}", "evaluation.mode_cutoff: got inf; input should be a finite number"),
        ("environment: {length: 1000000000}", "environment.length: got 1000000000"),
        ("learner: {batch_size: 1000000000000}", "learner.batch_size: got 1000000000000"),
        ("run: {seed: " + "x" * 500_000 + "}", "run.seed: got 'xxx"),
        ("run: {" + "x" * 900 + ": 1}", "unknown key"),
        ("run: {" + ", ".join(f"k{n}: 1" for n in range(10_000)) + "}", "and 9,980 more"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "bytes",
)  # fmt: skip
def test_a_malicious_config_is_refused(in_tmp_path, text, expected):
    assert expected in refused(text, in_tmp_path)
    assert os.listdir(in_tmp_path) == ["c.yaml"]


def test_a_file_without_end_is_read_only_so_far():
    with pytest.raises(ConfigError, match=r"/dev/zero: cannot be read .larger than 1,000,000 bytes"):
        load_config(Path("/dev/zero"))


@pytest.mark.parametrize("value", ["!!python/name:os.system", "*a", "[" * 1000, "{a: 1, a: 2}", "9" * 5000])
def test_values_on_the_command_line_are_read_as_safely(value):
    with pytest.raises(ConfigError, match=r"--run\.seed: not valid YAML"):
        load_config(DEFAULT_CONFIG, [("run.seed", value)])


def test_a_key_on_the_command_line_with_too_many_parts():
    with pytest.raises(ConfigError, match=r"run\.a: unknown key"):
        load_config(DEFAULT_CONFIG, [("run" + ".a" * 20_000, "1")])


def test_the_commands_name_the_fault_and_exit_with_2(in_tmp_path, capsys):
    from distributed.cli import exit_with

    (in_tmp_path / "c.yaml").write_text(bomb(10))
    for command in (run, sweep):
        with pytest.raises(SystemExit) as caught:
            exit_with(lambda _, command=command: command.main(["c.yaml"]))
        assert caught.value.code == 2
        assert "error: c.yaml: not valid YAML (aliases" in capsys.readouterr().err
    assert os.listdir(in_tmp_path) == ["c.yaml"]


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"replay": {"capacity": 10**9}, "environment": {"length": 4096}}, r"replay\.capacity: .* need 30,541\.8 GiB"),
        ({"network": {"hidden_size": 65536, "num_layers": 32}}, r"network\.hidden_size .* need 2,[0-9.]+ GiB"),
        ({"dynamics": {"network": {"hidden_size": 65536, "num_layers": 32}}}, r"parameters need 2,[0-9.]+ GiB"),
        ({"network": {"name": "transformer", "hidden_size": 65536}}, r"parameters need 1,[0-9.]+ GiB"),
        (
            {"environment": {"length": 4000, "noise": 0}, "dynamics": {"batch_size": 10**6},
             "learner": {"batch_size": 10**6}, "network": {"kmer_sizes": []}, "actors": {"batch_size": 10**6}},
            r"learner\.batch_size: the policy's outputs need 59\.6 GiB",
        ),
    ],
)  # fmt: skip
def test_what_no_memory_holds_is_refused_before_it_is_made(monkeypatch, section, expected):
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 40 << 30}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    with pytest.raises(ConfigError, match=f"{expected}; this machine has 40"):
        check_memory(validate(section), training=True)


def test_the_command_refuses_it_and_leaves_no_folder(in_tmp_path):
    with pytest.raises(ConfigError, match=r"replay\.capacity: trajectories of length 8 need .* GiB; this machine has"):
        run.main(["--run.name", "x", "--replay.capacity", str(10**9), "--environment.length", "8"])
    assert not os.listdir(in_tmp_path)


def test_an_enumeration_that_no_memory_holds_is_refused(in_tmp_path, toy):
    config = toy(**{"environment.length": 39, "evaluation.max_sequences": 10**12})
    with pytest.raises(ConfigError, match=r"evaluation\.max_sequences: 549,755,813,888 sequences need 6.* GiB"):
        run.train(config, None, None, None)


def test_a_space_with_more_sequences_than_digits_can_tell(in_tmp_path, toy):
    config = toy(**{"environment.length": 4096, "network.kmer_sizes": [], "environment.alphabet": "ABCDEFGHIJKLM"})
    with pytest.raises(ConfigError, match=r"evaluation\.exact: got 'always', but the space has about 10\^456"):
        run.train(config, None, None, None)


def test_grids_of_a_sweep_that_would_never_end():
    space = {f"k{n}": Domain(grid=tuple(range(100))) for n in range(10)}
    with pytest.raises(ConfigError, match=r"sweep\.space: 800,000,000,000,000,000,000 points; allowed: up to 100,000"):
        draw_points({}, space, 8, np.random.default_rng(0))


# --- names and folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../b", "a/b", ".", "..", "", ".hidden", "-x", "a\0b", "a\n", "a\nb", "a\\b", "a b", "ä", "x" * 101],
)  # fmt: skip
def test_names_of_runs_stay_in_their_folder(in_tmp_path, name):
    with pytest.raises(ConfigError, match=r"run\.name: got .*; string should match"):
        validate({"run": {"name": name}})
    assert not os.listdir(in_tmp_path)


@pytest.mark.parametrize("folder", ["a\0b", "a\nb", "\x1b[2J"])
def test_output_folders_that_cannot_be_shown(folder):
    with pytest.raises(ConfigError, match=r"run\.output_folder: got .*; allowed: a path of printable characters"):
        validate({"run": {"output_folder": folder}})


def unrelated(folder: Path) -> dict[Path, bytes]:
    """Everything below a folder."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize("content", [["config.yaml"], ["config.yaml", "plots/a.png"], ["config.yaml", "plots/", "x/y"]])
def test_a_folder_of_something_else_is_neither_removed_nor_used(in_tmp_path, toy, content):
    for name in content:
        path = in_tmp_path / "runs" / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("mine")
    before = unrelated(in_tmp_path)
    with pytest.raises(ConfigError, match=r"run\.name: the folder runs/toy exists"):
        RunFolder.create(toy())
    assert unrelated(in_tmp_path) == before


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_in_the_place_of_a_run_folder_is_not_followed(in_tmp_path, toy, target):
    RunFolder.create(toy())
    (in_tmp_path / "runs" / "toy").rename(in_tmp_path / "elsewhere")
    (in_tmp_path / "runs" / "toy").symlink_to(in_tmp_path / target)
    before = unrelated(in_tmp_path)
    with pytest.raises(ConfigError, match=r"run\.name: the folder runs/toy exists"):
        RunFolder.create(toy())
    assert unrelated(in_tmp_path) == before


def test_a_run_that_could_not_start_makes_room_for_the_next(in_tmp_path, toy):
    RunFolder.create(toy()).summary_file.write_text("{}")
    assert not RunFolder.create(toy()).summary_file.exists()


def test_damaged_records_of_a_run_are_passed_over(in_tmp_path, toy):
    folder = RunFolder.create(toy())
    lines = ['{"step": 1, "loss": 2, "x": "y"}', "[1]", "{}", '{"step": "1"}', "[" * 100_000, '{"step": 2']
    folder.metrics_file.write_bytes("\n".join(lines).encode() + b"\n\xff\xff\n")
    assert list(folder.read_metrics()) == [{"step": 1, "loss": 2}]
    for text in ("[" * 100_000, "[1]", " " * 2_000_000 + "{}"):
        folder.summary_file.write_text(text)
        assert folder.read_summary() == {}


def test_nothing_that_a_run_leaves_is_executable_or_writable_by_others(in_tmp_path, toy):
    folder = RunFolder.create(toy())
    folder.checkpoints.write(0, lambda _: {"step": 0})
    for path in folder.path.rglob("*"):
        if path.is_file():
            assert not path.stat().st_mode & 0o133, path


# --- oracles ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def csv_refused(tmp_path) -> Callable[[bytes], str]:
    """The message with which a CSV file of these bytes is refused."""

    def message(content: bytes) -> str:
        path = tmp_path / "data.csv"
        path.write_bytes(content)
        with pytest.raises(OracleDataError) as caught:
            csv_oracle(CsvOracleConfig(name="csv", path=path), ENVIRONMENT)
        assert str(caught.value).startswith(f"{path}: ")
        assert len(str(caught.value)) < 1000
        return str(caught.value)

    return message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"sequence,score\nAAA," + b"1" * 2_000_000 + b"\n", "a line of more than 1,000,000 characters"),
        (b"sequence,score\nAAA," + b"1" * 200_000 + b"\n", "field larger than field limit"),
        (b"a," * 1_000_000 + b"\n", "a line of more than 1,000,000 characters"),
        (b"a," * 400_000 + b"\n", "no column 'sequence'; it has ['a', 'a'"),
        (b"sequence,score,score\nAAA,1,2\n", "several columns 'score'"),
        (b"sequence,score\nA\0A,1\n", "has '\\x00' at position 2"),
        (b"sequence,score\nAAA,1\0\n", "row 1 has the score '1\\x00'"),
        (b"sequence,score\n\xff\xfeA,1\n", "'utf-8' codec can't decode"),
        (b"\xff\xfes\0e\0q\0", "'utf-8' codec can't decode"),
        (b"sequence,score\nAAA,nan\n", "row 1 has the score nan; allowed: finite numbers"),
        (b"sequence,score\nAAA,-inf\n", "row 1 has the score -inf; allowed: finite numbers"),
        (b"sequence,score\nAAA,1e999\n", "row 1 has the score inf; allowed: finite numbers"),
        (b"sequence,score\nAAA,-1\n", "row 1 has the negative score -1; allowed: scores >= 0"),
        (b"sequence,score\nAAA," + b"x" * 100_000 + b"\n", "row 1 has the score 'xxx"),
        (b"sequence,score\n" + b"A" * 100_000 + b",1\n", "has length 100000; allowed: 3"),
        (b"sequence,score\n=cmd|' /C calc'!A0,1\n", "allowed: 3"),
        (b'sequence,score\n"AAA,1\n', "row 1 has the score ''; allowed: a number|allowed: 3"),
    ],
    ids=lambda value: value[:24].decode("latin1") if isinstance(value, bytes) else "",
)  # fmt: skip
def test_a_malicious_table_is_refused(csv_refused, content, expected):
    assert any(part in csv_refused(content) for part in expected.split("|"))


def test_a_table_without_end_is_read_only_so_far(monkeypatch):
    monkeypatch.setattr(table, "MAX_LINE", 1000)
    with pytest.raises(OracleDataError, match=r"/dev/zero: cannot be read .a line of more than 1,000 characters"):
        csv_oracle(CsvOracleConfig(name="csv", path="/dev/zero"), ENVIRONMENT)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_paths_that_are_none(path):
    with pytest.raises(OracleDataError, match="cannot be read"):
        csv_oracle(CsvOracleConfig(name="csv", path=path), ENVIRONMENT)
    with pytest.raises(OracleDataError, match="not a readable"):
        npy_oracle(NpyOracleConfig(name="npy", tokens_path=path, scores_path=path), ENVIRONMENT)


@pytest.mark.parametrize(
    "content",
    [
        npy("(1000000000000, 3)"), npy("(10000000000,)"), npy("(3000000000, 3)", "'|i1'"), npy("(-1, 3)"),
        npy("(4611686018427387904, 4)"), npy("(" + "9" * 30 + ",)"), npy("(True,)"), npy("(1.5,)"), npy("(2,)", "'|O'"),
        npy("(2, 3)", "[('a', '|O')]"), npy("(2, 3)", "'|V1000000000'"), npy("(" * 3000 + ")" * 3000),
        npy("__import__('os').mkdir('sprung')"), npy("(1,) * 10**9"), b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        pickle.dumps(Trap(Path("sprung"))),
    ],
    ids=lambda value: value[8:90].decode("latin1").strip(),
)  # fmt: skip
def test_an_array_that_is_not_what_it_claims_is_refused(in_tmp_path, content):
    (in_tmp_path / "x.npy").write_bytes(content)
    np.save(in_tmp_path / "good.npy", np.ones((2, 3), int))
    for tokens, scores in (("x.npy", "good.npy"), ("good.npy", "x.npy")):
        with pytest.raises(OracleDataError, match=r"x\.npy: not a readable \.npy array"):
            npy_oracle(NpyOracleConfig(name="npy", tokens_path=tokens, scores_path=scores), ENVIRONMENT)
    assert sorted(os.listdir(in_tmp_path)) == ["good.npy", "x.npy"]


@pytest.mark.parametrize(
    "function",
    ["os:system; touch x", "os.system('touch x'):f", "os:system('touch x')", "a b:c", "-c:f", "../evil:f", "/tmp/evil:f",
     ":f", "os:", "os", "$(touch x):f", "`touch x`:f", "os:path.join", "a\n:f"],
)  # fmt: skip
def test_a_function_is_a_name_that_no_shell_sees(in_tmp_path, function):
    with pytest.raises(ConfigError, match=r"oracle\.function: got .*; allowed: package\.module:function"):
        validate({"oracle": {"name": "callable", "function": function}})


@pytest.mark.parametrize("command", [run, evaluate, sample, attention])
def test_the_help_says_that_a_checkpoint_names_what_is_run(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "you trust" in shown
    assert "oracle" in shown


# --- sweeps, comparisons, tokens -------------------------------------------------------------------------------------


SWEEP = {
    "key": "k", "name": "n", "metric": "loss", "mlflow_uri": "sqlite:///x.db", "working_directory": "/", "base": {},
    "sweep": {"space": {"run.seed": {"choice": [1]}}},
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{"key": 5}, {"key": "a\nb"}, {"name": None}, {"working_directory": ["/"]}, {"mlflow_uri": {}}, {"base": [1]}, {"base": "x"}],
)  # fmt: skip
def test_a_damaged_sweep_is_refused(tmp_path, changes):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP | changes))
    with pytest.raises(ConfigError, match=r"sweep\.yaml: damaged .*allowed is a"):
        load_sweep(tmp_path)


def test_names_from_a_shared_store_are_no_formulas(tmp_path):
    def stored(name: str, number: str) -> Any:
        info = SimpleNamespace(run_id="i", run_name=name, status="FINISHED")
        return SimpleNamespace(info=info, data=SimpleNamespace(params={"p": number}, metrics={"loss": -1.0}))

    runs = [stored('=HYPERLINK("http://evil")', "-1.5"), stored("@SUM(1)", "+cmd|x"), stored("plain", "-x")]
    write_csv(runs, ["loss"], tmp_path / "c.csv")
    lines = (tmp_path / "c.csv").read_text().splitlines()[1:]
    assert lines == [
        'i,"\'=HYPERLINK(""http://evil"")",FINISHED,-1.5,-1.0', "i,'@SUM(1),FINISHED,'+cmd|x,-1.0",
        "i,plain,FINISHED,'-x,-1.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "address", ["https://me:hush@host", "https://me:hu'sh@host", 'https://me:hu"sh@host', "https://hush@host", "https://h?token=hush"]
)  # fmt: skip
def test_passwords_are_no_part_of_configs_or_messages(address):
    with pytest.raises(ConfigError, match="no user or password is allowed") as caught:
        validate({"tracking": {"mlflow_uri": address}})
    assert not {"hush", "hu'sh", 'hu"sh'} & set(str(caught.value).replace("@", " ").replace(":", " ").split())
    assert "sh@" not in str(caught.value)


@pytest.mark.parametrize("there", [True, False])
def test_the_token_of_ray_is_for_this_user_only(tmp_path, monkeypatch, there):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if there:
        (tmp_path / ".ray").mkdir(mode=0o755)
    ray_token.hide_token_folder()
    assert stat.S_IMODE((tmp_path / ".ray").stat().st_mode) == (0o755 if there else 0o700)
    ray_token.token_file().write_text("secret")
    ray_token.protect_token()
    assert stat.S_IMODE(ray_token.token_file().stat().st_mode) == 0o600


def test_texts_are_read_whole_all_the_same():
    assert parse_yaml("{a: [1, 0x10, 1_000, -5, .5, 2020-01-01, yes, null], b: {c: 'é'}}", "here")["b"] == {"c": "é"}
    assert read_yaml(DEFAULT_CONFIG)
