"""Where a server listens: the socket is taken early, and every reason not to get it has a remedy."""

from __future__ import annotations

import errno
import ipaddress
import socket

from farstep.errors import InvalidOption

BACKLOG = 2048
"""Connections that may wait to be accepted."""

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
