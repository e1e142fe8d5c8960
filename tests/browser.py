"""A headless browser for tests that look at pages."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARTIFACTS = Path(os.environ.get("TEST_ARTIFACTS", Path(__file__).parents[1] / ".test_artifacts"))
"""Where screenshots are kept for people to look at."""


class Browser:
    def __init__(self, program: str, profile: Path, *options: str):
        self._command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}", *options,
        ]  # fmt: skip

    def content(self, address: str) -> str:
        """The page's document, after its scripts."""
        command = [*self._command, "--dump-dom", address]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    def screenshot(self, address: str, name: str) -> bytes:
        """A PNG, kept in `ARTIFACTS`."""
        ARTIFACTS.mkdir(exist_ok=True)
        picture = ARTIFACTS / name
        picture.unlink(missing_ok=True)
        subprocess.run(
            [*self._command, f"--screenshot={picture}", address], capture_output=True, timeout=120, check=True
        )
        return picture.read_bytes()


def find_browser(profile: Path, *options: str) -> Browser:
    """Skips the test where none is installed."""
    program = next((shutil.which(name) for name in NAMES if shutil.which(name)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    return Browser(program, profile, *options)
