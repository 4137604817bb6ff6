"""A reserve of file descriptors: a server without one cannot accept a connection, and cannot report it.

The kernel assigns the lowest free number. So a connection whose number is close to the limit shows that few are left:
then the connection that has been idle longest is closed, those without a token first. Connections are accepted one
after the other, so that a descriptor is free before the next one needs it.

Event loops handle this badly: they accept all pending connections at once, and when no descriptor is left, uvloop
silently closes connections, and asyncio stops accepting for a second.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import time
from collections.abc import Callable, Collection, Iterable
from math import inf
from operator import itemgetter
from typing import Protocol, final
from weakref import WeakKeyDictionary

TOLD_EVERY_S = 600.0
"""Seconds between two log lines while connections are being closed."""
PAUSE_S = 0.05
"""Seconds before accepting again after a failure."""

log = logging.getLogger("farstep.server")


class Evictable(Protocol):
    """A connection that may be closed to free its descriptor."""

    @property
    def idle_since(self) -> tuple[bool, float] | None:
        """Return whether it has shown a token, and since when it is idle; None during a request."""

    def make_room(self) -> None:
        """Close it."""


def most_descriptors() -> int:
    """Return the limit of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 62


@final
class Descriptors:
    """Keep a reserve of a server's descriptors free.

    Args:
        most: returns the limit.
        clock: seconds.
    """

    def __init__(self, most: Callable[[], int] = most_descriptors, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._silent_until = -inf
        self._crowd = inf

    def are_enough(self, number: int, reserve: int, connection: Evictable, connections: Collection[Evictable]) -> bool:
        """Return whether a new connection may stay; if few descriptors are left, another one is closed for it.

        Args:
            number: its descriptor.
            reserve: the number to keep free, at most a quarter of all.
            connection: the new one.
            connections: all of them.
        """
        most, others = self._most(), len(connections) - 1
        if number >= most - min(reserve, most // 4):
            self._crowd = min(self._crowd, others)
        elif others < self._crowd / 2:
            self._crowd = inf
        # Closed connections free low numbers, which the next ones get: their numbers do not show the crowd.
        return others < self._crowd or self.make_room(each for each in connections if each is not connection)

    def make_room(self, others: Iterable[Evictable]) -> bool:
        """Close the connection that has been idle longest, and return whether there was one."""
        now = self._clock()
        if now >= self._silent_until:
            self._silent_until = now + TOLD_EVERY_S
            log.warning(
                "hardly one of %d file descriptors is left: connections that wait are closed, the oldest first; "
                "if so many clients are yours, raise the limit (`ulimit -n`)",
                self._most(),
            )
        waiting = [(since, each) for each in others if (since := each.idle_since) is not None]
        if not waiting:
            return False
        min(waiting, key=itemgetter(0))[1].make_room()
        return True


async def accept(
    listening: socket.socket, protocol: Callable[[], asyncio.BaseProtocol], connections: Iterable[Evictable]
) -> None:
    """Accept connections until cancelled.

    Args:
        listening: the socket that listens.
        protocol: makes the protocol of a connection.
        connections: the present connections.
    """
    loop = asyncio.get_running_loop()
    listening.setblocking(False)
    while True:
        try:
            accepted, _ = await loop.sock_accept(listening)
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):  # something else than connections took the reserve
                descriptors_of(loop).make_room(connections)
            elif exc.errno != errno.ECONNABORTED:
                log.warning("a connection could not be accepted: %s", exc)
            await asyncio.sleep(PAUSE_S)
            continue
        try:
            await loop.connect_accepted_socket(protocol, accepted)
        except OSError as exc:
            accepted.close()
            log.info("a connection was gone before it was accepted: %s", exc)


_DESCRIPTORS: WeakKeyDictionary[asyncio.AbstractEventLoop, Descriptors] = WeakKeyDictionary()


def descriptors_of(loop: asyncio.AbstractEventLoop) -> Descriptors:
    """Return the descriptors of the server in an event loop."""
    descriptors = _DESCRIPTORS.get(loop)
    if descriptors is None:
        descriptors = _DESCRIPTORS[loop] = Descriptors()
    return descriptors
