"""Connections that wait for their next request."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Final, NamedTuple, final

import httpx

from farstep.transport.connection import Connection
from farstep.transport.forks import this

_PORTS: Final = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """Name what a connection leads to."""

    scheme: str
    host: str
    port: int
    server_name: str


def origin_of(request: httpx.Request) -> Origin:
    """Return what a request's connection leads to.

    Raises:
        httpx.UnsupportedProtocol: its URL is of another scheme than HTTP's.
    """
    scheme, url = request.url.scheme, request.url
    if scheme not in _PORTS:
        raise httpx.UnsupportedProtocol(f"Invalid URL {url}: it must begin with http:// or https://.", request=request)
    host = url.raw_host.decode("ascii")
    name: str = request.extensions.get("sni_hostname", host)
    return Origin(scheme, host, url.port or _PORTS[scheme], name)


@final
class Pool:
    """Keep idle connections, the one used last on top, for any thread.

    A process that was forked starts with an empty pool: two processes over one connection would mix their bytes.
    There is no bound on connections in use: every thread that sends has one.

    Args:
        idle_connections: how many are kept for each origin.
        idle_s: how long one is kept.
    """

    def __init__(self, *, idle_connections: int, idle_s: float) -> None:
        self._idle_connections = idle_connections
        self._idle_s = idle_s
        self._reset()

    def take(self, origin: Origin) -> Connection | None:
        """Return an idle connection that still is one, or None."""
        self._check_process()
        while True:
            with self._lock:
                waiting = self._idle.get(origin)
                connection = waiting.pop() if waiting else None
            if connection is None:
                return None
            if time.monotonic() - connection.idle_since < self._idle_s and connection.quiet():
                return connection
            self.drop(connection)

    def add(self, connection: Connection) -> None:
        """Take note of a new connection, so that `close` reaches it."""
        self._check_process()
        with self._lock:
            self._open.add(connection)

    def give(self, origin: Origin, connection: Connection) -> None:
        """Keep a connection whose exchange is over, or close it when there are enough."""
        self._check_process()
        connection.idle_since = time.monotonic()
        with self._lock:
            waiting = self._idle.setdefault(origin, [])
            kept = connection in self._open and not connection.closed and len(waiting) < self._idle_connections
            if kept:
                waiting.append(connection)
        if not kept:
            self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """Close a connection and forget it."""
        self._check_process()
        with self._lock:
            self._open.discard(connection)
        connection.close()

    def close(self) -> None:
        """Close the idle connections and end those in use; a thread that uses one gets an error."""
        self._check_process()
        with self._lock:
            idle = [each for waiting in self._idle.values() for each in waiting]
            used = [each for each in self._open if each not in idle]
            self._idle.clear()
            self._open.clear()
        for connection in idle:
            connection.close()
        for connection in used:
            connection.interrupt()

    def _check_process(self) -> None:
        if self._process is not this.process:
            self._reset()

    def _reset(self) -> None:
        self._process = this.process
        self._lock = threading.Lock()
        self._idle: dict[Origin, list[Connection]] = {}
        self._open: weakref.WeakSet[Connection] = weakref.WeakSet()  # weak: keep no unclosed response alive
