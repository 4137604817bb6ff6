"""Turns between connections that sent several requests at once: one request of each, then the event loop.

Thousands of small requests may arrive in one write. Answering them together would delay all clients that sent one
request; so the requests after the first wait here, and the connection is not read from.

    turn        one request of each connection that waits, for `TURN_S` together at most
    between     the event loop reads from sockets, answers single requests, and fires timers
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, final
from weakref import WeakKeyDictionary

TURN_S = 0.001
"""Seconds of a turn: the delay of others by all early requests together."""


class TurnTaker(Protocol):
    """A connection with requests that have arrived and were not begun."""

    def take_turn(self) -> None:
        """Begin one of them, and wait again if more remain."""


@final
class ConnectionTurns:
    """The turns of the connections of one event loop.

    Args:
        clock: seconds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.perf_counter) -> None:
        self._loop = loop
        self._clock = clock  # the loop's own may not advance while it runs callbacks
        self._waiting: deque[TurnTaker] = deque()
        self._called = False

    def wait(self, connection: TurnTaker) -> None:
        """Add a connection that waits for its turn."""
        self._waiting.append(connection)
        self._call()

    def _call(self) -> None:
        if self._waiting and not self._called:
            self._called = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._called = False
        end = self._clock() + TURN_S
        for _ in range(len(self._waiting)):
            self._waiting.popleft().take_turn()
            if self._clock() > end:
                break
        self._call()


_TURNS: WeakKeyDictionary[asyncio.AbstractEventLoop, ConnectionTurns] = WeakKeyDictionary()


def connection_turns(loop: asyncio.AbstractEventLoop) -> ConnectionTurns:
    """Return the turns of an event loop."""
    turns = _TURNS.get(loop)
    if turns is None:
        turns = _TURNS[loop] = ConnectionTurns(loop)
    return turns
