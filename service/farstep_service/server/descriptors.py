"""File descriptors that are kept free: a server without one can accept no connection, and cannot even say so.

The kernel gives the lowest number that is free. So a connection whose number is close to the limit says that hardly one
is left, before the last one is gone: then the connection that has been idle longest makes room, those first that have
never shown a token. Connections are accepted one after the other, so that room is there before the next one needs it.

Event loops do this badly: they accept all that come at once, and when none is left, uvloop takes connections and closes
them without a word, and asyncio's own stops taking any for a second.
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
"""Seconds from one line in the log to the next one, while connections are closed all the time."""
PAUSE_S = 0.05
"""Seconds until a connection is accepted again after one could not be."""

log = logging.getLogger("farstep.server")


class Evictable(Protocol):
    """A connection that may have to make room."""

    @property
    def idle_since(self) -> tuple[bool, float] | None:
        """Return whether it has shown a token, and the time since when it waits; None while a request is under way."""

    def make_room(self) -> None:
        """End it."""


def most_descriptors() -> int:
    """Return how many this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 62


@final
class Descriptors:
    """Keep some descriptors of a server free.

    Args:
        most: returns how many there may be.
        clock: seconds.
    """

    def __init__(self, most: Callable[[], int] = most_descriptors, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._silent_until = -inf
        self._crowd = inf

    def are_enough(self, number: int, reserve: int, connection: Evictable, connections: Collection[Evictable]) -> bool:
        """Return whether a new connection may stay; where hardly a descriptor is left, another one makes room for it.

        Args:
            number: its descriptor.
            reserve: how many are to be free; a quarter of all is enough.
            connection: the new one.
            connections: all of them.
        """
        most, others = self._most(), len(connections) - 1
        if number >= most - min(reserve, most // 4):
            self._crowd = min(self._crowd, others)
        elif others < self._crowd / 2:
            self._crowd = inf
        # Those who make room leave low numbers behind: the next ones get them, and make the crowd no smaller.
        return others < self._crowd or self.make_room(each for each in connections if each is not connection)

    def make_room(self, others: Iterable[Evictable]) -> bool:
        """Close the connection that has waited longest, and return whether there was one."""
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
        connections: those that there are.
    """
    loop = asyncio.get_running_loop()
    listening.setblocking(False)
    while True:
        try:
            accepted, _ = await loop.sock_accept(listening)
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):  # others than connections took what was kept free
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
    """Return the descriptors of the server that runs in an event loop."""
    descriptors = _DESCRIPTORS.get(loop)
    if descriptors is None:
        descriptors = _DESCRIPTORS[loop] = Descriptors()
    return descriptors
