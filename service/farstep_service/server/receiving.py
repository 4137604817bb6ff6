"""Receiving the body of one request into its memory, without a copy.

    reading     bytes go where the sink says              until all are there, the sink raises, or the pace is too slow
    dropping    bytes go nowhere                          until all are there: then the client reads why; not for ever
    over        the connection is HTTP again

A connection is lent to this protocol for the length of a body. The content of a body of known length, and of large
chunks, is received directly into its memory; the data around chunks goes through a small buffer, and bytes in it behind
the body are given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import final

from starlette.requests import ClientDisconnect

from farstep.errors import InvalidRequest
from farstep_service.limits import Limit
from farstep_service.routes import Pace, Sink
from farstep_service.server.framing import Framing

PIECE_BYTES = 512 * 1024
"""Bytes to receive at once, at most: they are hashed next, while a core's cache has them."""
SCRATCH_BYTES = 64 * 1024
DIRECT_BYTES = 16 * 1024
"""The content of a chunk from which a read of its own pays."""


@final
class BodyReceiver(asyncio.BufferedProtocol):
    """Receive the rest of a body.

    Args:
        transport: the connection.
        sink: provides the memory.
        framing: determines the end of the body.
        size: bytes of content that have not arrived; None if unknown.
        pace: the least pace.
        dropping: the limits of the rest once it is dropped.
        over: called at the end, with bytes behind the body.
        lost: called when the connection is lost.

    Attributes:
        ill_framed: whether the framing is invalid, so that neither the body's end nor the next request can be found.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        sink: Sink,
        framing: Framing,
        size: int | None,
        pace: Pace,
        dropping: Limit,
        over: Callable[[bytes], None],
        lost: Callable[[Exception | None], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._transport = transport
        self._sink: Sink | None = sink
        self._framing = framing
        self._size = size
        self._pace = pace
        self._dropping = dropping
        self._over = over
        self._lost = lost
        self._done: asyncio.Future[None] | None = loop.create_future()
        self._began = loop.time()
        self._before = self._seen = framing.received
        self._timer = loop.call_later(pace.idle_s, self._look)
        self._scratch = memoryview(bytearray(0))
        self._direct = False
        self._end: asyncio.TimerHandle | None = None
        self.ill_framed = False

    def start(self) -> None:
        """Take over the connection."""
        self._transport.pause_reading()
        self._transport.set_protocol(self)
        self._transport.resume_reading()

    async def wait(self) -> None:
        """Wait for the whole body; for errors see `Protocol._receive_into`."""
        if self._done is not None:
            await self._done

    def drop(self) -> None:
        """Drop the rest of the body, and references to the waiter, whose error would keep its memory alive."""
        self._sink = self._done = None
        if not self._framing.over:
            self._end = asyncio.get_running_loop().call_later(self._dropping.within_s, self._transport.abort)

    # -- asyncio.BufferedProtocol -----------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return memory for the next bytes."""
        framing = self._framing
        self._direct = framing.announced or framing.left >= DIRECT_BYTES
        if self._direct and self._sink is not None:
            try:
                return self._sink.get_buffer()[: min(framing.left, PIECE_BYTES)]
            except Exception as exc:
                self._fail(exc)
        if not self._scratch:
            self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        return self._scratch[: framing.left] if self._direct else self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        """Record received bytes."""
        rest = b""
        if self._direct:
            self._framing.took(nbytes)
            if self._sink is not None:
                try:
                    self._sink.buffer_updated(nbytes)
                except Exception as exc:
                    self._fail(exc)
        else:
            rest = self._take(bytes(self._scratch[:nbytes]))
        if self._framing.over:
            self._stop()
            self._sink = None  # uvloop keeps the last buffer alive as long as the connection
            self._over(rest)
            if self._done is not None and not self._done.done():
                self._done.set_result(None)

    def eof_received(self) -> bool:
        """Close: the client ended the stream before the end of the body."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Raise in the waiter, and notify the connection's owner."""
        self._stop()
        self._fail(ClientDisconnect())
        self._lost(exc)

    def pause_writing(self) -> None:
        """Do nothing: an answer is written after the body."""

    def resume_writing(self) -> None:
        """Do nothing."""

    # -- inside -----------------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> bytes:
        """Process content and the data around it; return the bytes behind the body."""
        try:
            pieces, used = self._framing.take(data)
        except InvalidRequest as exc:
            self._stop()
            self.ill_framed = True
            self._transport.pause_reading()
            if self._sink is None:
                self._transport.abort()
            self._fail(exc)
            return b""
        for piece in pieces:
            if self._sink is not None:
                try:
                    self._sink.feed(piece)
                except Exception as exc:
                    self._fail(exc)
        return data[used:]

    def _stop(self) -> None:
        self._timer.cancel()
        if self._end is not None:
            self._end.cancel()

    def _fail(self, exc: Exception) -> None:
        self._sink = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc)

    def _look(self) -> None:
        """Check that bytes arrive fast enough."""
        loop = asyncio.get_running_loop()
        elapsed_s, received = loop.time() - self._began, self._framing.received
        error = self._pace.too_slow(received - self._before, self._size, elapsed_s, silent=received == self._seen)
        if error is not None:
            if self._sink is None:  # the body is being dropped, and the client does not end it
                self._transport.abort()
                return
            self._fail(error)
        self._seen = received
        self._timer = loop.call_later(self._pace.idle_s, self._look)
