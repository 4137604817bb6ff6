"""The server that a run starts for itself: at a unix socket of its own, or on loopback TCP. It ends with the run.

at a socket    workers know its address before it listens: the path lies in a directory that only this user enters
on loopback    it takes a free port, and prints its address as one line of JSON when it listens
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from farstep.errors import FarstepError
from farstep.protocol.unix import MAX_PATH_BYTES

SERVER = "server"
"""The server's name among the processes of a run."""
OTHERS_OPTIONS = ("HOST", "PORT", "UNIX", "NO_TCP", "DATA_DIR", "DURABILITY")
"""Options of `farstep serve` that are not for the server of a run. The run sets its address. Its sessions end with the
run, and a data directory of the environment may belong to a server beside it, as in the image."""


@contextmanager
def socket_path() -> Iterator[str]:
    """Yield a path for the socket; remove it afterwards, with its directory."""
    with tempfile.TemporaryDirectory(prefix="farstep-", dir=_short_directory()) as directory:
        yield f"{directory}/s"


def _short_directory() -> str:
    """Return the usual directory for temporary files, or /tmp if its path is too long for a socket."""
    usual = tempfile.gettempdir()
    return usual if len(usual.encode()) + len("/farstep-12345678/s") <= MAX_PATH_BYTES else "/tmp"


def command_at_socket(path: str) -> tuple[str, ...]:
    """Return the command of a server that listens at a socket only, and logs warnings."""
    return _serve("--unix", path, "--no-tcp", "--log-level", "warning")


def command_on_loopback(port: int = 0, *options: str) -> tuple[str, ...]:
    """Return the command of a server on loopback TCP; 0 is any free port."""
    return _serve("--host", "127.0.0.1", "--port", str(port), "--json", *options)


def _serve(*options: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", "farstep_service", "serve", *options)


def address_of(line: bytes) -> tuple[str, int]:
    """Return the URL and the process id that a server on loopback prints in its first line.

    Raises:
        FarstepError: the line is something else.
    """
    try:
        document = json.loads(line)
        return str(document["url"]), int(document["pid"])
    except (ValueError, TypeError, KeyError) as exc:
        text = line.decode(errors="replace")
        raise FarstepError(f"The server's first line is not its address: {text:.200}", side="client") from exc


def environment_of(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the server's environment: the user's, without the variables that are not for it."""
    own = {f"FARSTEP_SERVE_{option}" for option in OTHERS_OPTIONS}
    return {name: value for name, value in inherited.items() if name not in own}
