"""Matrices of JASPAR 2026: how transcription factors bind DNA.

They come, with their names, with the PyPI package pyjaspar; nothing is downloaded. Shapes: w positions of a motif.
"""

import difflib
from collections.abc import Sequence
from contextlib import closing
from sqlite3 import Connection
from typing import NamedTuple

import numpy as np

from actors.oracles.base import OracleDataError

RELEASE = "JASPAR2026"
LETTERS = "ACGT"
PSEUDOCOUNT = 0.8
"""What Nishida et al. (2009, Nucleic Acids Research 37:939) recommend for practical use."""
_SELECT_ENTRIES = """
    SELECT BASE_ID, VERSION, NAME, COLLECTION, VAL FROM MATRIX
    LEFT JOIN MATRIX_ANNOTATION ON MATRIX_ANNOTATION.ID = MATRIX.ID AND TAG = 'tax_group' ORDER BY BASE_ID, VERSION
"""


class Motif(NamedTuple):
    """A matrix of JASPAR."""

    matrix_id: str
    """With its version, such as MA0139.2."""
    name: str
    """Name of the transcription factor."""
    log_odds: np.ndarray
    """float64 [w, 4] (A C G T): log of a letter's probability over the background's, in nats."""


class _Entry(NamedTuple):
    base_id: str
    version: int
    name: str
    collection: str
    group: str

    @property
    def matrix_id(self) -> str:
        return f"{self.base_id}.{self.version}"


def motif_matrices(
    names: Sequence[str],
    *,
    pseudocount: float = PSEUDOCOUNT,
    gc_background: float = 0.5,
    origin: str = "oracle.motifs",
) -> list[Motif]:
    """The matrices of JASPAR ids or names, upper or lower case alike.

    A name stands for the latest versions of the CORE collection. Of several with this name those of vertebrates are
    preferred, and of them the lowest id, which names the main profile, not a variant or dimer; a name that only other
    groups share is ambiguous.
    Raises OracleDataError naming `origin` for an unknown id, and for an unknown or ambiguous name.
    """
    import pyjaspar  # here, because with Biopython it takes a while and only this oracle needs it

    database = pyjaspar.jaspardb(release=RELEASE)
    with closing(database.conn) as connection:
        entries = _entries(connection)
        found = [_resolve(name, entries, origin) for name in names]
        counts = [database.fetch_motif_by_id(entry.matrix_id).counts for entry in found]
    tables = [np.array([rows[letter] for letter in LETTERS]).T for rows in counts]
    return [
        Motif(entry.matrix_id, entry.name, _log_odds(table, pseudocount, gc_background))
        for entry, table in zip(found, tables, strict=True)
    ]


def _entries(connection: Connection) -> list[_Entry]:
    """Every matrix (without its counts), versions ascending."""
    return [_Entry(*row) for row in connection.execute(_SELECT_ENTRIES)]


def _log_odds(counts: np.ndarray, pseudocount: float, gc_background: float) -> np.ndarray:
    """float64 [w, 4] of `counts` float [w, 4], against a background with as much G as C and as much A as T."""
    probabilities = (counts + pseudocount / 4) / (counts.sum(1, keepdims=True) + pseudocount)
    background = np.array([1 - gc_background, gc_background, gc_background, 1 - gc_background]) / 2
    return np.log(probabilities / background)


def _resolve(asked: str, entries: list[_Entry], origin: str) -> _Entry:
    latest = {entry.base_id: entry for entry in entries}
    by_id = latest | {entry.matrix_id: entry for entry in entries}
    if asked.upper() in by_id:
        return by_id[asked.upper()]
    core = [entry for entry in latest.values() if entry.collection == "CORE"]
    named = [entry for entry in core if entry.name.casefold() == asked.casefold()]
    named = [entry for entry in named if entry.group == "vertebrates"] or named
    if not named:
        known = {key.casefold(): key for key in [*by_id, *(entry.name for entry in core)]}
        close = [known[key] for key in difflib.get_close_matches(asked.casefold(), known, n=5)]
        alike = f"; similar: {', '.join(close)}" if close else ""
        raise OracleDataError(
            f"{origin}: got {asked!r}; allowed: a matrix id of {RELEASE} or a name of its CORE collection{alike}"
        )
    if len({entry.group for entry in named}) > 1:
        choices = ", ".join(f"{entry.matrix_id} ({entry.group})" for entry in named)
        raise OracleDataError(f"{origin}: the name {asked!r} is ambiguous; allowed: an id, one of {choices}")
    return min(named)
