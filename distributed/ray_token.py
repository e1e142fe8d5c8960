"""The token that all processes of a Ray cluster share."""

import contextlib
import os
import stat
from pathlib import Path


def token_file() -> Path:
    """Where Ray looks for the token that all processes of a cluster share."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def described_token() -> str:
    """The token that was sent, by the place where it was found."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return f"a connection without a token (RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']})"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the token in RAY_AUTH_TOKEN"
    file = token_file()
    return f"the token in {file}" if file.is_file() else f"a connection without a token (there is no {file})"


def hide_token_folder() -> None:
    """Make the folder of the token, if there is none, so that only this user can read what Ray will write into it."""
    with contextlib.suppress(OSError):  # Ray will say what is wrong with it
        token_file().parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def protect_token() -> None:
    """Keep other users of this machine from reading the token, which Ray writes for all to read."""
    file = token_file()
    with contextlib.suppress(OSError):  # of another user, or on a file system without permissions
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            file.chmod(0o600)
