"""The on-premises variant of a cluster.yaml."""

from pathlib import Path
from typing import Any

import yaml


def for_hosts(cluster: Path, head: str, workers: list[str], key: Path) -> dict[str, Any]:
    """`cluster` with only the provider, the way in and the hosts replaced; commands and file mounts stay as they are."""
    values = yaml.safe_load(cluster.read_text())
    for section in ("available_node_types", "head_node_type"):
        del values[section]
    values["provider"] = {"type": "local", "head_ip": head, "worker_ips": workers}
    values["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
    values["min_workers"] = values["max_workers"] = len(workers)
    return values
