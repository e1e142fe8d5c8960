"""Waiting for what other processes do."""

import subprocess
import time
from collections.abc import Callable


def wait_for(
    condition: Callable[[], object],
    *,
    seconds: float,
    why: Callable[[], object] = lambda: "it did not happen in time",
    process: subprocess.Popen | None = None,
) -> None:
    """Until `condition()` holds; fails with `why()` after `seconds`, and at once if `process` has ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"it ended too soon: {why()}"
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)
