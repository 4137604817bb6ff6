"""Servers at a path of this machine: `unix:///run/farstep/server.sock`.

The rest after `unix://` is the path, without decoding. The permissions of the socket file decide who may connect, so
that such a server needs no token.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Final

from farstep.errors import InvalidOption, Side, Unauthorized

SCHEME: Final = "unix://"
MAX_PATH_BYTES: Final = 107 if sys.platform == "linux" else 103
"""The longest path of a socket; the system's structure holds one more byte, the terminator."""
_SHORTEST_S: Final = 0.001  # a timeout of 0 would make the socket non-blocking


def url_of_path(path: str) -> str:
    """Return the URL of a server at a path."""
    return SCHEME + path


def path_of_url(url: str) -> str | None:
    """Return the path in a unix URL, None for another URL."""
    return url[len(SCHEME) :] if url.startswith(SCHEME) else None


def connected(path: str, timeout_s: float | None) -> socket.socket:
    """Return a socket that is connected to the server at a path.

    Raises:
        Unauthorized: the server belongs to another user; a retry would not help.
        OSError: no server listens there; TimeoutError after `timeout_s`.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(path)
        return sock
    except PermissionError as exc:
        sock.close()
        raise Unauthorized(
            f"The socket {path} is not open to user {os.geteuid()}.",
            remedy="Run as the user that the server runs as, or let it listen on a TCP port.",
            side="client",
        ) from exc
    except BaseException:
        sock.close()
        raise


def dialer(path: str) -> Callable[[object, float | None], socket.socket]:
    """Return a function that connects a transport to the server at a path, for any origin."""
    return lambda _origin, timeout_s: connected(path, None if timeout_s is None else max(timeout_s, _SHORTEST_S))


def check_path(path: str, *, field: str, side: Side) -> None:
    """Refuse a path that is not valid for a socket.

    Raises:
        InvalidOption: it is not absolute, names a directory, or is too long; or this system has no such sockets.
    """
    if sys.platform == "win32":
        raise InvalidOption("Unix sockets are not supported on Windows.", field=field, side=side)
    if not os.path.isabs(path) or path.endswith("/") or "\0" in path:
        raise InvalidOption(
            f"Invalid {field}: {path!r:.200} is not the absolute path of a socket.",
            remedy="Give a path such as /run/farstep/server.sock; its URL is unix:///run/farstep/server.sock.",
            field=field,
            side=side,
        )
    if (size := len(os.fsencode(path))) > MAX_PATH_BYTES:
        raise InvalidOption(
            f"Invalid {field}: the path {path!r:.200} has {size} bytes.",
            remedy=f"The system allows {MAX_PATH_BYTES} for a socket's path: choose a shorter one.",
            field=field,
            limit=MAX_PATH_BYTES,
            side=side,
        )
