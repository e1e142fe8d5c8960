"""docs/metrics.md against what runs write."""

import json
import re
from pathlib import Path

GLOSSARY = Path(__file__).parents[1] / "docs" / "metrics.md"
ROWS = re.findall(r"^\| (`.*?`) \|", GLOSSARY.read_text(), re.MULTILINE)
NAMES = {name for row in ROWS for name in re.findall(r"`([a-z0-9_…]+)`", row)}
"""Names in the first columns; … stands for any text."""


def keys(folder: Path) -> set[str]:
    """Every name in summary.json and metrics.jsonl of a run."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return set(json.loads((folder / "summary.json").read_text())).union(*records)


def unexplained(folder: Path) -> set[str]:
    """Names of a run that the glossary has not."""
    known = re.compile("|".join(re.escape(name).replace("…", ".+") for name in NAMES))
    return {key for key in keys(folder) if not known.fullmatch(key)}
