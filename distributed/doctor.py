"""Is this machine ready?  python -m distributed.doctor [--address auto|HOST:PORT] [--json]

Checks Python, torch, GPU, Ray and its token, ports, the MLflow store, free disk, memory and shared memory, and says what to do
about what is not as it should be. Exit code 1 if something would stop a run.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from rich.markup import escape
from rich.table import Table

from distributed import cli
from distributed.config import ConfigError, ExperimentConfig, validate
from distributed.config_keys import without_credentials
from distributed.mlflow_store import cause_of, check_files, connect_client, tracking_uri
from distributed.progress import results_console
from distributed.ray_token import token_file

GIB = 2**30
MIN_DISK, MIN_MEMORY, MIN_SHARED = 5 * GIB, 4 * GIB, 1 * GIB
PORTS = {6379: "Ray's head node", 8265: "the Ray dashboard", 5000: "mlflow ui"}
CONNECT_SECONDS = 5.0


class Finding(NamedTuple):
    """What a check found."""

    check: str
    verdict: Literal["ok", "note", "wrong"]
    """wrong: a run would fail; note: something to know."""
    found: str
    advice: str = ""
    """What to do; empty if nothing."""


def check_python() -> Iterator[Finding]:
    """The interpreter, and whose package is called `distributed`."""
    version = ".".join(map(str, sys.version_info[:3]))
    fine = sys.version_info >= (3, 11)
    yield Finding("Python", "ok" if fine else "wrong", version, "" if fine else "install Python 3.11 or newer")
    found = Path(__file__).resolve().parent
    spec = importlib.util.find_spec("distributed")
    other = Path(spec.origin).resolve().parent if spec and spec.origin else found
    if other == found:
        yield Finding("package", "ok", str(found))
    else:
        advice = "Dask's package has the same name: put this project's folder first on PYTHONPATH"
        yield Finding("package", "wrong", f"`distributed` is {other}", advice)


def check_torch() -> Iterator[Finding]:
    """PyTorch and its devices."""
    import torch

    yield Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
        yield Finding("GPU", "ok", names)
    elif shutil.which("nvidia-smi"):
        advice = "the driver is there, but this torch cannot use it: install a CUDA build that fits the driver"
        yield Finding("GPU", "note", "not usable", advice)
    else:
        yield Finding("GPU", "ok", "none; the learner runs on the CPU")


def check_ray() -> Iterator[Finding]:
    """Ray, its extras, and the token that processes of a cluster share."""
    version = importlib.metadata.version("ray")
    fine = tuple(int(part) for part in version.split(".")[:2]) >= (2, 60)
    yield Finding(
        "Ray", "ok" if fine else "wrong", version, "" if fine else "pip install 'ray[default,tune,train]>=2.60'"
    )
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        mode = os.environ["RAY_AUTH_MODE"]
        yield Finding(
            "Ray token", "wrong", f"RAY_AUTH_MODE={mode}", "unset it: without a token anybody may run code here"
        )
        return
    path = token_file()
    if os.environ.get("RAY_AUTH_TOKEN"):
        yield Finding("Ray token", "ok", "in RAY_AUTH_TOKEN")
    elif not path.is_file():
        advice = "a local run makes one; for a cluster: ray get-auth-token --generate, and the same file on all nodes"
        yield Finding("Ray token", "note", f"{path} is not there", advice)
    elif stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding("Ray token", "note", f"{path} can be read by others", f"chmod 600 {path}")
    else:
        yield Finding("Ray token", "ok", str(path))


def check_ports() -> Iterator[Finding]:
    """Whether the usual ports are free on localhost."""
    for port, user in PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(CONNECT_SECONDS)
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        advice = "fine if that is yours; otherwise choose another port" if taken else ""
        yield Finding(f"port {port}", "note" if taken else "ok", f"{'in use' if taken else 'free'} ({user})", advice)


def check_mlflow() -> Iterator[Finding]:
    """Whether the store answers; a sqlite store that is not there yet is made by the first run."""
    uri = tracking_uri(ExperimentConfig())
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.exists():
        fine = os.access(path.parent, os.W_OK)
        advice = "" if fine else "choose another working directory, or set MLFLOW_TRACKING_URI"
        yield Finding("MLflow", "ok" if fine else "wrong", f"{path} will be made by the first run", advice)
        return
    try:
        check_files(uri)
        connect_client(uri).search_experiments(max_results=1)
    except Exception as error:  # the client raises many types
        advice = "start the server, or change MLFLOW_TRACKING_URI; runs go on without, and send their metrics later"
        yield Finding("MLflow", "note", cause_of(error), advice)
    else:
        yield Finding("MLflow", "ok", without_credentials(uri))


def check_room() -> Iterator[Finding]:
    """Free disk here, memory, and shared memory, in which Ray keeps what actors hand over."""
    free = shutil.disk_usage(Path.cwd()).free
    advice = "" if free >= MIN_DISK else "make room, or set run.output_folder: checkpoints need a few GB"
    yield Finding("disk", "note" if advice else "ok", f"{free / GIB:.0f} GiB free in {Path.cwd()}", advice)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    advice = "" if memory >= MIN_MEMORY else "use fewer rollout actors, or a smaller replay.capacity"
    yield Finding("memory", "note" if advice else "ok", f"{memory / GIB:.0f} GiB", advice)
    shared = Path("/dev/shm")  # noqa: S108 - only looked at
    if shared.is_dir():
        size = shutil.disk_usage(shared).free
        advice = "" if size >= MIN_SHARED else "in a container: docker run --shm-size=4g; Ray is slow without"
        yield Finding("shared memory", "note" if advice else "ok", f"{size / GIB:.1f} GiB free", advice)


def check_cluster(address: str) -> Iterator[Finding]:
    """Whether the cluster answers, and what it has."""
    import ray

    from distributed.backend import RunFailed
    from distributed.ray_runtime import connect

    try:
        own = connect(validate({"run": {"address": address}}), 0.0)
    except (RunFailed, ConfigError) as error:
        yield Finding("cluster", "wrong", str(error), "see README, 'A cluster'")
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    found = f"{len(nodes)} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
    yield Finding("cluster", "ok", found)
    if own:
        ray.shutdown()


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python, check_torch, check_ray, check_ports, check_mlflow, check_room,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m distributed.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", metavar="ADDRESS", help="also check this Ray cluster: auto, or HOST:PORT")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(arguments)
    findings = [finding for check in CHECKS for finding in check()]
    if options.address is not None:
        findings += check_cluster(options.address)
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        _print(findings)
    return cli.EXIT_FAILED if any(finding.verdict == "wrong" for finding in findings) else cli.EXIT_DONE


def _print(findings: list[Finding]) -> None:
    colours = {"ok": "green", "note": "yellow", "wrong": "red"}
    table = Table("check", "", "found", "what to do")
    for finding in findings:
        verdict = f"[{colours[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(finding.check, verdict, escape(finding.found), escape(finding.advice))
    console = results_console()
    console.print(table)


if __name__ == "__main__":
    cli.exit_with(main)
