"""Compare objectives:  python -m distributed.compare_objectives [CONFIG.yaml] [--section.key value …] [--out FOLDER]

Trains every variant of the file's section `comparison` at every noise level and seed, each for the same CPU seconds of one
core, and writes results.jsonl (a line for each), table.csv and table.png. Run again with the same folder to continue.
"""

import argparse
import csv
import hashlib
import json
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

from distributed import cli
from distributed.comparison import (
    COLUMNS,
    KEYS,
    Cell,
    ComparisonConfig,
    Summary,
    compute,
    make_cells,
    read_results,
    summarise,
)
from distributed.config import ConfigError, apply_overrides, read_yaml
from distributed.config_keys import validate_section
from distributed.progress import configure_logging, results_console, stderr

DEFAULT_COMPARISON = Path(__file__).resolve().parents[1] / "tune_configs" / "compare_objectives.yaml"
logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m distributed.compare_objectives", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", nargs="?", type=Path, default=DEFAULT_COMPARISON, help="YAML file with a comparison")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_objectives"), help="folder of the results")
    options, overrides = cli.parse_with_overrides(parser, arguments)
    configure_logging()
    values = apply_overrides(read_yaml(options.config), overrides)
    comparison = validate_section(ComparisonConfig, "comparison", values.pop("comparison", {}))
    cells = make_cells(values, comparison)
    results = _open(options.out, cells, comparison)
    done = {tuple(result[key] for key in KEYS) for result in results}
    remaining = [cell for cell in cells if cell[:3] not in done]
    logger.info("%d cells of %g CPU seconds, %d of them done", len(cells), comparison.cpu_seconds, len(done))
    failed = _compute_all(remaining, comparison, options.out / "results.jsonl", results)
    rows = summarise(results)
    if rows:
        from distributed.plots import comparison_plot  # which the processes of the cells need not load

        _write_csv(rows, options.out / "table.csv")
        comparison_plot(rows, options.out / "table.png")
        _print(rows, comparison, options.out)
    return cli.EXIT_FAILED if failed else cli.EXIT_DONE


def _open(folder: Path, cells: list[Cell], comparison: ComparisonConfig) -> list[dict[str, Any]]:
    """The finished cells in `folder`, which is made; raises ConfigError if it belongs to another comparison."""
    identity = [[*cell[:4], cell.config.model_dump(mode="json")] for cell in cells]
    text = json.dumps([comparison.cpu_seconds, identity], sort_keys=True)
    digest, mark = hashlib.sha256(text.encode()).hexdigest(), folder / "comparison.sha256"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if mark.exists() and mark.read_text() != digest:
            raise ConfigError(f"--out: {folder} holds the results of another comparison; choose another folder")
        mark.write_text(digest)
    except OSError as error:
        raise ConfigError(f"--out: {folder} cannot be written ({error})") from error
    return read_results(folder / "results.jsonl")


def _compute_all(remaining: list[Cell], comparison: ComparisonConfig, path: Path, results: list[dict[str, Any]]) -> int:
    """Compute the cells, appending each to `results` and to `path` as it ends; returns how many failed."""
    if not remaining:
        return 0
    size, failed = min(len(remaining), comparison.num_processes or os.cpu_count() or 1), 0
    context = multiprocessing.get_context("forkserver")  # a fresh process for each cell, its imports done once for all
    context.set_forkserver_preload([__spec__.name, "torch._dynamo"])  # the latter is loaded by the first optimiser
    pool = ProcessPoolExecutor(size, mp_context=context, max_tasks_per_child=1)
    ended = False
    try:
        futures = {pool.submit(compute, cell, comparison.cpu_seconds): cell for cell in remaining}
        for future in track(as_completed(futures), "comparing", len(remaining), console=stderr):
            cell = futures[future]
            try:
                result = future.result()
            except Exception as error:  # a cell's fault must not cost the others
                failed += 1
                logger.error("%s, noise %g, seed %d failed: %s", *cell[:3], error)
                continue
            results.append(result)
            with open(path, "a") as file:
                file.write(json.dumps(result) + "\n")
            logger.info("%s, noise %g, seed %d: %s", *cell[:3], _shown(result))
        ended = True
    finally:
        if not ended:
            for child in multiprocessing.active_children():
                child.terminate()
        pool.shutdown(cancel_futures=True)
    return failed


def _shown(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {result[name]:.4g}" for name in COLUMNS if result.get(name) is not None)


def _write_csv(rows: list[Summary], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        names = [f"{name}_{kind}" for name in COLUMNS for kind in ("median", "min", "max")]
        writer.writerow(["variant", "noise", "num_seeds", *names])
        for row in rows:
            values = [row.figures.get(name, ("", "", "")) for name in COLUMNS]
            writer.writerow([row.variant, row.noise, row.num_seeds, *(v for triple in values for v in triple)])


def _print(rows: list[Summary], comparison: ComparisonConfig, folder: Path) -> None:
    table = Table(title=f"{comparison.cpu_seconds:g} CPU seconds each; median over seeds (smallest–largest)")
    for name in ("noise", "variant", "exact TV", "excess KL", "mean score", "top 100", "modes", "trajectories"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        cells = [f"{row.noise:g}", row.variant]
        for name, form in zip(COLUMNS[:-1], ("{:.3f}", "{:.3f}", "{:.3f}", "{:.3f}", "{:.0f}", "{:,.0f}"), strict=True):
            if name not in row.figures:
                cells.append("–")
                continue
            shown = [form.format(value) for value in row.figures[name]]
            cells.append(f"{shown[0]} ({shown[1]}–{shown[2]})" if name in ("exact_tv", "excess_kl") else shown[0])
        table.add_row(*cells)
    console = results_console(120)
    console.print(table)
    console.print(f"{folder}/results.jsonl, table.csv, table.png", soft_wrap=True)


if __name__ == "__main__":
    cli.exit_with(main)
