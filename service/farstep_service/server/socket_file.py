"""The listening sockets of a server: on an address of this machine, or at a path that only its user may use.

Both are opened early, and every error has a remedy. A socket file has mode 0600 before the socket listens, and its
directory must not let other users replace it. A file left behind by a killed server is removed only if no server
listens on it; the directory's lock serialises servers that start at the same time.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from farstep.errors import InvalidOption
from farstep.protocol.unix import check_path

BACKLOG = 2048
"""The number of connections that may wait to be accepted."""

_REMEDIES = {
    errno.EADDRINUSE: "Another program, perhaps another server of ours, has it: choose another --port, or 0 for any.",
    errno.EADDRNOTAVAIL: "Give an address of this machine, 127.0.0.1, or 0.0.0.0 for all of them.",
    errno.EACCES: "Choose a --port of 1024 or more.",
}


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address of this machine.

    Raises:
        InvalidOption: it cannot be had; the error says why and what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as exc:
        raise InvalidOption(
            f"{host!r} is not an address of this machine.", remedy=_REMEDIES[errno.EADDRNOTAVAIL], field="host"
        ) from exc
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise InvalidOption(
            f"Cannot listen on {host} port {port}: {exc.strerror}.",
            remedy=_REMEDIES.get(exc.errno or 0, ""),
            field="host" if exc.errno == errno.EADDRNOTAVAIL else "port",
        ) from exc
    return sock


def url_of(sock: socket.socket) -> str:
    """Return the URL at which a client on this machine reaches a listening socket."""
    address, port = sock.getsockname()[:2]
    if ipaddress.ip_address(address).is_unspecified:
        address = "127.0.0.1" if sock.family == socket.AF_INET else "::1"
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


OWNER_ONLY = 0o600
ASK_WITHIN_S = 1.0
"""The time that an existing socket has to accept a connection; a busy one counts as in use."""


@contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    """Yield a socket that listens at a path, and remove its file afterwards.

    Raises:
        InvalidOption: it cannot be had; the error says why and what to do.
    """
    check_path(path, field="unix", side="server")
    try:
        sock, identity = _bind(path)
    except OSError as exc:
        raise InvalidOption(
            f"Cannot listen at {path}: {exc.strerror}.",
            remedy="Choose a path in a directory that is there and that this user may write to.",
            field="unix",
        ) from exc
    try:
        with sock:
            yield sock
    finally:
        with suppress(FileNotFoundError):
            if _identity(os.lstat(path)) == identity:  # otherwise another one has replaced it
                os.unlink(path)


def _bind(path: str) -> tuple[socket.socket, tuple[int, int]]:
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _check_directory(path, os.fstat(directory))
        fcntl.flock(directory, fcntl.LOCK_EX)
        _remove_stale(path)
        sock.bind(path)
        os.chmod(path, OWNER_ONLY)
        sock.listen(BACKLOG)
        return sock, _identity(os.lstat(path))
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)


def _check_directory(path: str, found: os.stat_result) -> None:
    if found.st_mode & stat.S_IWOTH or found.st_uid not in (0, os.geteuid()):
        whose = "every user may write to" if found.st_mode & stat.S_IWOTH else "belongs to another user"
        raise InvalidOption(
            f"Refusing to listen at {path}: its directory {whose}, who could put a socket of their own there.",
            remedy="Choose a directory of this user's own, such as $XDG_RUNTIME_DIR or /run/farstep.",
            field="unix",
        )


def _remove_stale(path: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise InvalidOption(
            f"Cannot listen at {path}: something that is not a socket is there.",
            remedy="Choose another --unix path, or move it away.",
            field="unix",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(ASK_WITHIN_S)
        refused = asking.connect_ex(path)
    if refused != errno.ECONNREFUSED:
        raise InvalidOption(
            f"Cannot listen at {path}: another program, perhaps another server of ours, has it.",
            remedy="Choose another --unix path, or end that server.",
            field="unix",
        )
    os.unlink(path)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
