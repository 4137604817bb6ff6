"""The body of one request on its way into memory, with no copy in between.

    reading     bytes go where the sink says              until all are there, the sink raises, or the pace is too slow
    dropping    bytes go nowhere                          until all are there: then the client reads why
    over        the connection is HTTP again

A connection is handed to this protocol for the length of a body and handed back after it. Bytes behind the body are
never read here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import final

from starlette.requests import ClientDisconnect

from farstep_service.routes import Pace, Sink

PIECE_BYTES = 512 * 1024
"""Bytes received at once, at most: they are hashed next, while a core's cache still has them."""
DROP_BYTES = 64 * 1024


@final
class Reading(asyncio.BufferedProtocol):
    """Receive the rest of a body.

    Args:
        transport: the connection.
        sink: says where the bytes go.
        left: bytes that are still to come.
        pace: how slow they may come.
        over: called when all have come.
        lost: called when the connection is gone.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        sink: Sink,
        left: int,
        pace: Pace,
        over: Callable[[], None],
        lost: Callable[[Exception | None], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._transport = transport
        self._sink: Sink | None = sink
        self._size = self._left = left
        self._pace = pace
        self._over = over
        self._lost = lost
        self._done: asyncio.Future[None] | None = loop.create_future()
        self._began = loop.time()
        self._seen = left
        self._timer = loop.call_later(pace.idle_s, self._look)
        self._dropped = memoryview(bytearray(0))

    def start(self) -> None:
        """Take the connection over."""
        self._transport.pause_reading()
        self._transport.set_protocol(self)
        self._transport.resume_reading()

    async def wait(self) -> None:
        """Wait for the whole body; see `Protocol._receive_into` for what is raised."""
        if self._done is not None:
            await self._done

    def drop(self) -> None:
        """Let what is still to come go nowhere, and forget who waited: an error would keep its memory through us."""
        self._sink = self._done = None

    # -- asyncio.BufferedProtocol -----------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        if self._sink is not None:
            try:
                return self._sink.get_buffer()[: min(self._left, PIECE_BYTES)]
            except Exception as exc:
                self._fail(exc)
        if not self._dropped:
            self._dropped = memoryview(bytearray(DROP_BYTES))
        return self._dropped[: self._left]

    def buffer_updated(self, nbytes: int) -> None:
        """Take note of bytes that have come."""
        self._left -= nbytes
        if self._sink is not None:
            try:
                self._sink.buffer_updated(nbytes)
            except Exception as exc:
                self._fail(exc)
        if self._left == 0:
            self._timer.cancel()
            self._sink = None  # uvloop remembers whose buffer it read into last, for as long as the connection lives
            self._over()
            if self._done is not None and not self._done.done():
                self._done.set_result(None)

    def eof_received(self) -> bool:
        """Close: the client has said its last byte, and it was not the body's."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits, and the connection's owner."""
        self._timer.cancel()
        self._fail(ClientDisconnect())
        self._lost(exc)

    def pause_writing(self) -> None:
        """Have nothing to do: an answer is written after the body."""

    def resume_writing(self) -> None:
        """Have nothing to do."""

    # -- inside -----------------------------------------------------------------------------------------------------

    def _fail(self, exc: Exception) -> None:
        self._sink = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc)

    def _look(self) -> None:
        """See whether bytes have come, and fast enough on the whole."""
        loop = asyncio.get_running_loop()
        elapsed_s = loop.time() - self._began
        error = self._pace.too_slow(self._size - self._left, self._size, elapsed_s, silent=self._left == self._seen)
        if error is not None:
            if self._sink is None:  # nobody is interested any more, and the client does not come to an end
                self._transport.abort()
                return
            self._fail(error)
        self._seen = self._left
        self._timer = loop.call_later(self._pace.idle_s, self._look)
