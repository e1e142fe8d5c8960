"""The direction of imports, and that our packages are ours."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "learner": {"actors", "distributed", "ray", "mlflow"},
    "actors": {"distributed", "ray", "mlflow"},
    "distributed": {"tests"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_layers_import_only_downwards(layer):
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    offenders = {str(path): imported(path) & FORBIDDEN[layer] for path in files}
    assert not {path: names for path, names in offenders.items() if names}


@pytest.mark.parametrize("package", ["learner", "actors", "distributed"])
def test_packages_are_ours(package):
    """Dask ships a package called `distributed` too."""
    module = __import__(package)
    assert Path(module.__file__).parent == ROOT / package


def test_files_stay_small():
    long = {
        str(p): n
        for layer in FORBIDDEN
        for p in (ROOT / layer).rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long
