"""Checkpoints and saved buffers made to do harm: each is refused in time, in little memory, with nothing run or written."""

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from actors.replay_buffer import ReplayBuffer, ReplayConfig, SavedBufferError
from actors.trajectories import empty_batch
from distributed import attention, evaluate, sample
from distributed.backend import Accounting, RunFailed
from distributed.checkpoints import LEARNER_FILE, load_sampler, load_state, restore_learner
from distributed.config import ConfigError, ExperimentConfig, validate
from distributed.experiment import make_learner, make_replay_buffer
from distributed.local_backend import SerialBackend
from learner.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.conftest import TOY
from tests.hostile import Trap, bomb, frugal, npy  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("frugal")

# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[ExperimentConfig, Path, dict[str, Any]]:
    """A toy's configuration, and its checkpoint after three steps with its state."""
    config, folder = validate(TOY), tmp_path_factory.mktemp("original") / "step_000000003"
    backend = SerialBackend(config)
    folder.mkdir()
    try:
        for _ in range(3):
            backend.step()
        state = {"backend": backend.save(folder), "step": 3, "wall_seconds": 1.5, "run_key": "a1/b_2-c"}
    finally:
        backend.close()
    (folder / "state.json").write_text(json.dumps(state))
    restore_learner(make_learner(config), folder)
    return config, folder, state


@pytest.fixture
def saved(tmp_path, original) -> SimpleNamespace:
    """A copy of the checkpoint: `config`, `folder`, `state`, and `change`, which rewrites the learner's file."""
    config, source, state = original
    folder = shutil.copytree(source, tmp_path / source.name)
    content = load_checkpoint(folder / LEARNER_FILE)

    def change(**changes: Any) -> None:
        """Dotted keys, whose parts __ separates."""
        for key, value in changes.items():
            node: Any = content
            *parents, last = key.split("__")
            for parent in parents:
                node = node[int(parent) if parent.isdigit() else parent]
            node[last] = value(node[last]) if callable(value) else value
        save_checkpoint(folder / LEARNER_FILE, content)

    return SimpleNamespace(config=config, folder=folder, file=folder / LEARNER_FILE, state=state, change=change)


def both_refused(saved: SimpleNamespace, expected: str) -> None:
    """Neither a run that goes on nor an evaluation takes the learner's file."""
    with pytest.raises(CheckpointError, match=expected):
        restore_learner(make_learner(saved.config), saved.folder)
    with pytest.raises(CheckpointError, match=expected):
        load_sampler(saved.folder)


def rezipped(file: Path, compression: int, change: Callable[[str, bytes], bytes] = lambda _, data: data) -> None:
    """Write an archive anew."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


@pytest.mark.parametrize("suffix", ["data.pkl", "data/0"])
def test_a_learner_that_would_unpack_to_more_than_its_file(saved, suffix):
    rezipped(saved.file, zipfile.ZIP_DEFLATED, lambda name, data: bytes(20 << 20) if name.endswith(suffix) else data)
    assert saved.file.stat().st_size < 1 << 20
    both_refused(saved, r"learner\.pt: .*a compressed archive; allowed")


def claim(file: Path, size: int) -> None:
    """Make the directory of an archive say that its entries are stored with this size."""
    content = bytearray(file.read_bytes())
    place = content.find(b"PK\x01\x02")
    while place >= 0:
        struct.pack_into("<II", content, place + 20, size, size)
        place = content.find(b"PK\x01\x02", place + 4)
    file.write_bytes(content)


def test_a_learner_whose_entries_claim_more_than_its_file(saved):
    claim(saved.file, 2**31)
    both_refused(saved, r"learner\.pt: .*whose entries claim more")


def test_a_learner_of_a_size_that_none_has(saved):
    os.truncate(saved.file, 1 << 40)  # takes no room on the disk
    both_refused(saved, r"learner\.pt: .*1,099,511,627,776 bytes; allowed: up to 17,179,869,184")


def test_a_malicious_pickle_is_a_message_of_every_command(saved, in_tmp_path):
    torch.save({"format_version": 2, "config": Trap(in_tmp_path / "sprung")}, saved.file)
    both_refused(saved, r"learner\.pt: damaged, cut short or not a checkpoint")
    for command in (evaluate, sample, attention):
        with pytest.raises(ConfigError, match=r"learner\.pt: damaged, cut short or not a checkpoint"):
            command.main([str(saved.file), *(["ABA"] if command is attention else [])])
    assert not (in_tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (5, "content is not that of a checkpoint"),
        ("run: !!python/object/apply:os.mkdir [sprung]", "could not determine a constructor"),
        (bomb(10), "aliases"),
        ("oracle: {name: callable, function: 'os:system(1)'}", "allowed: package.module:function"),
    ],
)
def test_a_malicious_config_in_a_checkpoint(saved, in_tmp_path, config, expected):
    saved.change(config=config)
    with pytest.raises(CheckpointError, match=expected):
        load_sampler(saved.folder)
    assert not (in_tmp_path / "sprung").exists()


def test_a_config_in_a_checkpoint_that_no_memory_holds(saved):
    config = yaml.safe_load(saved.config.to_yaml())
    config["network"] |= {"hidden_size": 65536, "num_layers": 32}
    saved.change(config=yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"network\.hidden_size .* GiB; this machine has"):
        evaluate.main([str(saved.file)])


@pytest.mark.parametrize(
    "weights",
    [
        lambda w: w * torch.nan, lambda w: w + torch.inf, lambda w: torch.zeros(len(w), device="meta"),
        lambda w: w.to(torch.complex64), lambda w: w.to_sparse(), lambda w: w.tolist(), lambda w: None, lambda w: w[0],
    ],
    ids=["nan", "inf", "meta", "complex", "sparse", "list", "none", "scalar"],
)  # fmt: skip
def test_weights_that_are_none(saved, weights):
    saved.change(learner__averaged=weights)
    both_refused(saved, r"learner\.pt: ")


@pytest.mark.parametrize("weights", [lambda w: w[:1], lambda w: w[:-1], lambda w: torch.zeros(1).expand(10**12)])
def test_weights_of_another_size(saved, weights):
    saved.change(learner__policy=weights)
    with pytest.raises(CheckpointError, match="does not fit this configuration"):
        restore_learner(make_learner(saved.config), saved.folder)


@pytest.mark.parametrize("step", [-1, 2**60, 1.5, True, "3", None, float("nan")])
def test_a_step_that_is_none(saved, step):
    saved.change(learner__step=step)
    both_refused(saved, r"learner\.pt: .*step: got .*; allowed: a number of learner steps")


MOMENTS = "learner__policy_optimiser"


@pytest.mark.parametrize(
    "changes",
    [
        {f"{MOMENTS}__means": lambda m: m[:1]},
        {f"{MOMENTS}__squares": lambda m: m[:-1]},
        {f"{MOMENTS}__means": lambda m: m.repeat(2)},
        {f"{MOMENTS}__means": lambda m: m.double()},
        {f"{MOMENTS}__means": lambda m: m * torch.nan},
        {f"{MOMENTS}__means": lambda m: m.tolist()},
        {f"{MOMENTS}__squares": lambda m: m - 1},
        {f"{MOMENTS}__count": -1},
        {f"{MOMENTS}__count": 2.5},
        {f"{MOMENTS}__count": torch.zeros(0)},
        {MOMENTS: lambda m: [m]},
        {MOMENTS: {}},
    ],
    ids=lambda changes: next(iter(changes))[len("learner__policy_optimiser") :],
)
def test_moments_that_would_be_written_beyond_their_end(saved, changes):
    saved.change(**changes)
    with pytest.raises(CheckpointError, match=r"learner\.pt: does not fit this configuration"):
        restore_learner(make_learner(saved.config), saved.folder)


def test_moments_that_share_their_memory_are_taken_apart(saved):
    saved.change(**{f"{MOMENTS}__means": lambda m: torch.zeros(1).expand(len(m))})
    learner = make_learner(saved.config)
    restore_learner(learner, saved.folder)
    assert learner.policy_optimiser.state_dict()["means"].stride() == (1,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 100_000, "missing or damaged"),
        ("[]", "not a mapping"),
        ("{}", "has no 'step'"),
        (" " * 2_000_000, "larger than 1,000,000 bytes"),
        ('{"step": 1, "step": NaN}', "step: got 'nan'"),
        ('{"step": 1e999}', "step: got 'inf'"),
        ('{"step": -1}', "step: got '-1'"),
        ('{"step": true}', "step: got 'True'"),
        ('{"step": ' + "9" * 5000 + "}", "missing or damaged"),
        (b"\xff\xfe", "can't decode"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_a_malicious_state_is_refused(saved, text, expected):
    (saved.folder / "state.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CheckpointError, match=r"state\.json: .*" + expected):
        load_state(saved.folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"step": "../x"}, "step: got"), ({"wall_seconds": float("inf")}, "wall_seconds"), ({"wall_seconds": -1}, "wall_"),
        ({"wall_seconds": None}, "damaged"), ({"run_key": "x' OR name LIKE '%"}, "run_key: got"), ({"run_key": 5}, "damaged"),
        ({"run_key": "x\n"}, "run_key: got"), ({"backend": None}, "damaged"), ({"backend": {"accounting": []}}, "damaged"),
        ({"backend": {"accounting": {"num_sampled": "1"}}}, "num_sampled: got '1'"),
    ],
)  # fmt: skip
def test_a_state_with_something_else_in_it_is_refused(saved, changes, expected):
    load_state(saved.folder)
    (saved.folder / "state.json").write_text(json.dumps(saved.state | changes))
    with pytest.raises(CheckpointError, match=r"state\.json: .*" + expected):
        load_state(saved.folder)


def test_counters_cannot_replace_methods():
    accounting = Accounting()
    accounting.load_state_dict(accounting.state_dict() | {"count_rollout": 1, "__class__": 2})
    assert callable(accounting.count_rollout)


@pytest.mark.parametrize(
    "part", [{"worker": {}}, {"worker": {"rng": {}, "version": 1}}, {"number": None}, {"number": "x"}]
)
def test_a_backend_that_cannot_go_on_says_where(saved, part):
    (saved.folder / "state.json").write_text(json.dumps(saved.state | {"backend": saved.state["backend"] | part}))
    backend = SerialBackend(saved.config)
    try:
        with pytest.raises(RunFailed, match=r"state\.json: damaged"):
            backend.start(saved.folder)
    finally:
        backend.close()


# --- replay buffers --------------------------------------------------------------------------------------------------


BUFFER = {"num_steps": 3, "seed": 0, "num_actions": 4}


@pytest.fixture
def buffer_file(tmp_path) -> Path:
    buffer, batch = ReplayBuffer(ReplayConfig(capacity=8), **BUFFER), empty_batch(3, 5)
    batch.num_steps[:] = 3
    buffer.add(batch, "a", 0)
    buffer.set_offline(batch)
    buffer.save(tmp_path / "b.npz")
    ReplayBuffer(ReplayConfig(capacity=8), **BUFFER).load(tmp_path / "b.npz")
    return tmp_path / "b.npz"


def buffer_refused(path: Path, expected: str) -> None:
    with pytest.raises(SavedBufferError, match=expected) as caught:
        ReplayBuffer(ReplayConfig(capacity=8), **BUFFER).load(path)
    assert str(caught.value).startswith(f"{path}: ")


def with_array(path: Path, name: str, array: np.ndarray) -> None:
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    with open(path, "wb") as file:
        np.savez(file, **(arrays | {name: array}))


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("tokens", np.full((5, 3), 4, np.int16), "tokens: from 4 to 4; allowed: 0 to 3"),
        ("actions", np.full((5, 3), -1, np.int16), "actions: from -1 to -1; allowed: 0 to 3"),
        ("num_steps", np.full(5, 4, np.int16), "num_steps: from 4 to 4; allowed: 1 to 3"),
        ("num_steps", np.full(5, 0, np.int16), "num_steps: from 0 to 0; allowed: 1 to 3"),
        ("tokens", np.zeros((5, 3), np.int64), "tokens: int64"),
        ("tokens", np.zeros((5, 3, 2), np.int16), "tokens: int16"),
        ("scores", np.zeros((5, 2), np.float32), "scores: float32"),
        ("scores", np.zeros(5, "<U9"), "scores: <U9"),
        ("scores", np.full(5, np.nan, np.float32), "scores: allowed are finite"),
        ("scores", np.full(5, -1, np.float32), "scores: allowed are finite"),
        ("seed", np.zeros(4, np.int64), "seed does not fit"),
        ("tokens", np.int16(3), "damaged"),
        ("tokens", np.array([Trap(Path("sprung"))] * 5, object), "allow_pickle=False"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("prefix", ["online_", "offline_"])
def test_a_saved_trajectory_that_leads_out_of_its_space(buffer_file, in_tmp_path, prefix, name, array, expected):
    with_array(buffer_file, prefix + name, array)
    buffer_refused(buffer_file, expected)
    assert not (in_tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_added": -1}, {"num_added": "5"}, {"num_added": 5.0}, {"num_added": True}, {"num_added": 10**30},
        {"num_duplicates": None}, {"last_number": []}, {"last_number": {"a": "x"}}, {"rng": {}}, {"rng": None},
        {"rng": {"bit_generator": "MT19937"}}, {"format_version": [2]}, {"num_added": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_a_saved_buffer_with_wrong_counts(buffer_file, changes):
    with np.load(buffer_file) as file:
        state = json.loads(str(file["state"]))
    with_array(buffer_file, "state", np.array(json.dumps(state | changes)))
    buffer_refused(buffer_file, "damaged|another replay.capacity|format version")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "", "5"], ids=lambda text: text[:5])
def test_a_saved_buffer_with_another_state(buffer_file, text):
    with_array(buffer_file, "state", np.array(text))
    buffer_refused(buffer_file, "damaged")


def test_a_saved_buffer_that_would_unpack_to_more_than_its_file(buffer_file):
    rezipped(buffer_file, zipfile.ZIP_DEFLATED, lambda name, data: data + bytes(20 << 20) if "tokens" in name else data)
    assert buffer_file.stat().st_size < 1 << 20
    buffer_refused(buffer_file, "a compressed archive; allowed")


def test_a_saved_buffer_whose_entries_claim_more_than_its_file(buffer_file):
    claim(buffer_file, 2**31)
    buffer_refused(buffer_file, "whose entries claim more")


def test_a_saved_buffer_larger_than_its_configuration_allows(buffer_file):
    os.truncate(buffer_file, 1 << 40)
    buffer_refused(buffer_file, "1,099,511,627,776 bytes; allowed: up to 6")


@pytest.mark.parametrize("shape", ["(1000000000000, 3)", "(10000000000, 3)", "(-5, 3)", "(" * 3000])
def test_an_array_in_a_saved_buffer_that_claims_another_shape(buffer_file, shape):
    rezipped(buffer_file, zipfile.ZIP_STORED, lambda name, data: npy(shape, "'<i2'") if "online_tok" in name else data)
    buffer_refused(buffer_file, "damaged")


def test_entries_with_paths_are_not_unpacked(buffer_file):
    with zipfile.ZipFile(buffer_file, "a") as archive:
        archive.writestr("../evil.npy", npy("(6,)"))
        archive.writestr("/tmp/evil.npy", npy("(6,)"))
    before = sorted(buffer_file.parent.parent.iterdir())
    buffer = ReplayBuffer(ReplayConfig(capacity=8), **BUFFER)
    buffer.load(buffer_file)
    assert (len(buffer), sorted(buffer_file.parent.parent.iterdir())) == (5, before)


def test_a_run_knows_the_tokens_of_its_buffer(saved):
    with_array(saved.folder / "replay_buffer.npz", "online_tokens", np.full((192, 3), 2, np.int16))
    with pytest.raises(SavedBufferError, match="tokens: from 2 to 2; allowed: 0 to 1"):
        make_replay_buffer(saved.config).load(saved.folder / "replay_buffer.npz")
