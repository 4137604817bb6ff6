"""A client that does not take at once what is written for it, and for how long that may go on.

A client that reads an answer slowly holds what the answer is made of: a version of the parameters, or a connection that
is to be closed. It has to take something now and then, and enough on the whole.
"""

from __future__ import annotations

import asyncio
from typing import final

from farstep_service.limits import Limit

LOOKS = 4
"""How often within the time for which a reader may take nothing its progress is looked at."""


@final
class SlowReader:
    """Watch what is taken from a connection's buffer, and cut the connection off when that is too little.

    Args:
        transport: the connection, with something in its buffer.
        limit: how little is too little.

    Attributes:
        over: whether all has been taken, so that there is nothing to watch.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, limit: Limit) -> None:
        self.over = False
        self._loop = loop
        self._transport = transport
        self._limit = limit
        self._left = transport.get_write_buffer_size()
        self._taken = 0
        self._began = loop.time()
        self._timer = self._in_a_while(LOOKS)

    def wrote(self, count: int) -> None:
        """Take note of bytes that go into the buffer behind the others."""
        self._left += count

    def stop(self) -> None:
        """Watch no longer."""
        self.over = True
        self._timer.cancel()

    def _in_a_while(self, looks: int) -> asyncio.TimerHandle:
        return self._loop.call_later(self._limit.silent_s / LOOKS, self._look, looks)

    def _look(self, looks: int) -> None:
        left = self._transport.get_write_buffer_size()
        taken, self._left = self._left - left, left
        self._taken += taken
        elapsed_s = self._loop.time() - self._began
        if not left:
            self.over = True
        elif elapsed_s > self._limit.silent_s + self._taken / self._limit.least_bytes_per_s or (
            not taken and looks <= 1
        ):
            self._transport.abort()
        else:
            self._timer = self._in_a_while(LOOKS if taken else looks - 1)
