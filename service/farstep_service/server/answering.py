"""Answers on their way to the client, and the watch on clients that read slowly.

The head of an answer goes into the same write as the start of its body: between two writes the client would wake up for
the head alone. ASGI asks for this order, too: a server begins to answer when there is a body to send.

    whole      a body in one piece, on a connection that is kept: head and body are written here at once
    else       uvicorn's cycle writes the answer, and the head is held back until the body begins

A slow reader holds the memory of its answer, such as a version of the parameters, and its connection. So `SlowReader`
demands some progress within a time, and a rate overall.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache, partial
from typing import final

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HEADER_VALUE_RE, STATUS_LINE, RequestResponseCycle

from farstep.errors import Busy, FarstepError
from farstep_service.limits import Limit
from farstep_service.routes import OUTGOING, PROBLEM, problem_of
from farstep_service.routes.problems import RETRY_AFTER_S

LOOKS = 4
"""The number of checks within the time that a reader may stall."""


@final
class SlowReader:
    """Watch the rate at which a connection's buffer drains, and abort the connection when it is too low.

    Args:
        transport: the connection, with data in its buffer.
        limit: the limit of its rate.

    Attributes:
        over: whether the buffer is empty, so that the watch has ended.
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
        """Record bytes that were added to the buffer."""
        self._left += count

    def stop(self) -> None:
        """Stop watching."""
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


LENGTH = b"content-length"
PLAIN = frozenset({LENGTH, b"content-type", b"date", b"server"})
"""Headers that do not affect the connection."""
HEADS_KEPT = 64
"""Heads to remember; those of successive steps differ at most in a length."""


@final
class Answering:
    """A wrapper of the application, and of the connection that uvicorn writes its answers to.

    Args:
        app: answers the request.
        cycle: the request, as uvicorn sees it.
        transport: the connection.
        wrote: called with the number of bytes written to the connection, unless they are sent at once.
    """

    def __init__(
        self,
        app: ASGIApp,
        cycle: RequestResponseCycle,
        transport: asyncio.Transport,
        wrote: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._app = app
        self._cycle = cycle
        self._transport = transport
        self._wrote = wrote
        self._start: Message | None = None
        self._held: list[bytes] | None = None
        self._handed = 0
        self._began = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("extensions", {})[OUTGOING] = self
        try:
            await self._app(scope, receive, partial(self._send, send))
        finally:
            # Break these reference cycles, which would leave each request to the garbage collector.
            self._cycle.transport = self._transport
            scope.pop("extensions", None)

    async def _send(self, send: Send, message: Message) -> None:
        if message["type"] == "http.response.start" and self._start is None:
            self._start = message
            return
        if not self._handed:
            self._began = asyncio.get_running_loop().time()
        self._handed += memoryview(message.get("body", b"")).nbytes
        start, self._start = self._start, None
        if start is None:
            await send(message)
        elif not self._write_whole(start, message):
            self._held = []
            try:
                await send(start)
                await send(message)
            finally:
                self._let_go()

    def _write_whole(self, start: Message, message: Message) -> bool:
        """Write a complete, ordinary answer; return whether that was done."""
        cycle, body = self._cycle, message.get("body", b"")
        usual = cycle.keep_alive and not (
            message.get("more_body") or cycle.access_log or cycle.disconnected or cycle.flow.write_paused
        )
        if not usual or cycle.scope["method"] == "HEAD":
            return False
        head = _head(start["status"], (*cycle.default_headers, *start["headers"]), len(body))
        if head is None:
            return False
        cycle.response_started = cycle.response_complete = True
        self._transport.set_write_buffer_limits(high=0)  # sent now, and not at the end of this turn of the loop
        self._transport.writelines((head, body))
        self._transport.set_write_buffer_limits()
        cycle.message_event.set()
        cycle.on_response()
        return True

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held:
            self._wrote(sum(map(len, held)))
            self._transport.writelines(held)

    # -- what others see of it (`farstep_service.sessions.Outgoing`) --------------------------------------------------

    def progress(self) -> tuple[float, int] | None:
        """Return the seconds since the body's first byte was available, and the bytes taken; None before."""
        if not self._handed:
            return None
        seconds = asyncio.get_running_loop().time() - self._began
        return seconds, self._handed - self._transport.get_write_buffer_size()

    def cut(self) -> None:
        """Abort the connection within the answer."""
        self._transport.abort()

    # -- what uvicorn's cycle asks of a transport ---------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write, or hold back for the next write."""
        if self._held is None:
            self._wrote(len(data))
            self._transport.write(data)
        else:
            self._held.append(data)

    def close(self) -> None:
        """Write the bytes held back, and close."""
        self._let_go()
        self._transport.close()

    def is_closing(self) -> bool:
        """Return whether the connection is being closed."""
        return self._transport.is_closing()


def last_answer(error: FarstepError, status: int | None = None) -> bytes:
    """Return the complete answer to a request that the application does not get; the connection is closed after it.

    Args:
        status: the HTTP status, if not the error's own.
    """
    body = problem_of(error, status=status)
    busy = b"retry-after: %s\r\n" % RETRY_AFTER_S if isinstance(error, Busy) else b""
    line = STATUS_LINE[error.status if status is None else status]
    kind = b"content-type: %s\r\ncontent-length: %d\r\n" % (PROBLEM, len(body))
    return b"".join([line, kind, busy, b"connection: close\r\n\r\n", body])


@lru_cache(maxsize=HEADS_KEPT)
def _head(status: int, headers: tuple[tuple[bytes, bytes], ...], size: int) -> bytes | None:
    """Return the head of an answer whose body has `size` bytes; None if uvicorn has to write it."""
    lengths = [value for name, value in headers if name == LENGTH]
    known = all(name in PLAIN and not HEADER_VALUE_RE.search(value) for name, value in headers)
    if not known or lengths != [b"%d" % size]:
        return None
    return b"".join([STATUS_LINE[status], *(b"%s: %s\r\n" % header for header in headers), b"\r\n"])
