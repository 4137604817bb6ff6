"""The body of one request on its way into memory, with no copy in between.

    reading     bytes go where the sink says              until all are there, the sink raises, or the pace is too slow
    dropping    bytes go nowhere                          until all are there: then the client reads why; not for ever
    over        the connection is HTTP again

A connection is handed to this protocol for the length of a body and handed back after it. The content of a body of
known length, and of large chunks, is received where it is used; what stands around chunks goes through a small buffer,
and the bytes in it that are behind the body are handed back.
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
"""Bytes received at once, at most: they are hashed next, while a core's cache still has them."""
SCRATCH_BYTES = 64 * 1024
DIRECT_BYTES = 16 * 1024
"""Content of a chunk that is worth a read of its own."""


@final
class BodyReceiver(asyncio.BufferedProtocol):
    """Receive the rest of a body.

    Args:
        transport: the connection.
        sink: says where the bytes go.
        framing: says where the body ends.
        size: bytes of content that are still to come; None if that is not known.
        pace: how slow they may come.
        dropping: how long the rest may take once it is no longer wanted.
        over: called when all have come, with bytes behind the body.
        lost: called when the connection is gone.

    Attributes:
        ill_framed: whether the body's end cannot be found any more, nor the next request; nothing is read then.
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
        if not self._framing.over:
            self._end = asyncio.get_running_loop().call_later(self._dropping.within_s, self._transport.abort)

    # -- asyncio.BufferedProtocol -----------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
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
        """Take note of bytes that have come."""
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
            self._sink = None  # uvloop remembers whose buffer it read into last, for as long as the connection lives
            self._over(rest)
            if self._done is not None and not self._done.done():
                self._done.set_result(None)

    def eof_received(self) -> bool:
        """Close: the client has said its last byte, and it was not the body's."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits, and the connection's owner."""
        self._stop()
        self._fail(ClientDisconnect())
        self._lost(exc)

    def pause_writing(self) -> None:
        """Have nothing to do: an answer is written after the body."""

    def resume_writing(self) -> None:
        """Have nothing to do."""

    # -- inside -----------------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> bytes:
        """Take content and what stands around it; return what is behind the body."""
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
        """See whether bytes have come, and fast enough on the whole."""
        loop = asyncio.get_running_loop()
        elapsed_s, received = loop.time() - self._began, self._framing.received
        error = self._pace.too_slow(received - self._before, self._size, elapsed_s, silent=received == self._seen)
        if error is not None:
            if self._sink is None:  # nobody is interested any more, and the client does not come to an end
                self._transport.abort()
                return
            self._fail(error)
        self._seen = received
        self._timer = loop.call_later(self._pace.idle_s, self._look)
