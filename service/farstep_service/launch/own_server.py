"""A server of the launch's own, at a socket in a directory that nobody else may enter."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from farstep.unix import MAX_PATH_BYTES, url_of_path

SERVER = "server"
PLACES = ("HOST", "PORT", "UNIX", "NO_TCP")
"""Variables of `farstep serve` that say where; this server is where its workers look for it."""


@contextmanager
def place_for_socket() -> Iterator[str]:
    """Yield a path for the socket; it is gone afterwards, with its directory."""
    with tempfile.TemporaryDirectory(prefix="farstep-", dir=_short_enough()) as directory:
        yield f"{directory}/s"


def directory_of(path: str) -> str:
    """Return the directory that was made for a socket."""
    return os.path.dirname(path)


def _short_enough() -> str:
    """Return the usual directory for temporary files, or /tmp if paths in that are too long for a socket."""
    usual = tempfile.gettempdir()
    return usual if len(usual.encode()) + len("/farstep-12345678/s") <= MAX_PATH_BYTES else "/tmp"


def url_of(path: str) -> str:
    """Return the URL of the server at a path."""
    return url_of_path(path)


def command_of(path: str) -> tuple[str, ...]:
    """Return the command of a server at a path and nowhere else."""
    serve = ("-m", "farstep_service", "serve", "--unix", path, "--no-tcp", "--log-level", "warning")
    return (sys.executable, "-P", *serve)


def environment_of(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of that server: the user's, but for those that say where it is."""
    own = {f"FARSTEP_SERVE_{each}" for each in PLACES}
    return {name: value for name, value in inherited.items() if name not in own}
