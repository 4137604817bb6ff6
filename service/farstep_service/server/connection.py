"""How a connection ends: by deadlines, refusals, stalled readers, and lack of descriptors.

connection_made     there is room for it, or one that waits makes room (`descriptors.py`)
_within             the state that it enters has so many seconds
_refuse             what cannot be answered by the application is answered here, and is the last answer
_close              what was written leaves first, which a reader cannot put off for ever (`slow_reader.py`)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from farstep.errors import Busy, FarstepError
from farstep_service.limits import CONNECTION
from farstep_service.server.answering import SlowReader, last_answer
from farstep_service.server.descriptors import descriptors_of


class Connection(HttpToolsProtocol):
    """A connection that keeps to its limits, independent of its requests."""

    limits = CONNECTION

    _timer: asyncio.TimerHandle | None = None
    _reader: SlowReader | None = None
    _rest = b""
    _closed = False
    _lent = False
    _dropping = False
    _known = False
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._within(self.limits.waiting.within_s, self._close)
        number = transport.get_extra_info("socket").fileno()
        connections = cast("set[Connection]", self.connections)
        if not descriptors_of(self.loop).are_enough(number, self.limits.crowd.most, self, connections):
            busy = "The server has hardly a file descriptor left, and each of its connections is in use."
            self._refuse(Busy(busy, remedy="Try again shortly; its `ulimit -n` says how many it can have."))

    @property
    def idle_since(self) -> tuple[bool, float] | None:
        """Return whether it has shown a token, and when its last answer was complete; None while one is pending."""
        under_way = self._lent or not self._is_answered()
        return None if under_way or self.transport.is_closing() else (self._known, self._since)

    def make_room(self) -> None:
        """Close an idle connection."""
        self._close()
        self.transport.abort()

    def _is_answered(self) -> bool:
        """Return whether no request is waiting for its answer."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return cycle is None or cycle.response_complete

    def _refuse(self, error: FarstepError, status: int | None = None) -> None:
        """Answer a request that the application does not get, and close."""
        if self._closed or self.transport.is_closing():
            return
        begun = self._dropping
        if not self._is_answered():
            begun = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not begun:
            self.transport.write(last_answer(error, status))
        self._close()

    def _close(self) -> None:
        """Close after the written data has been sent, which a reader cannot delay forever."""
        self._closed, self._rest = True, b""
        self._within(None)
        self.transport.close()
        self._watch_reader()

    def _within(self, seconds: float | None, then: Callable[..., None] | None = None, *args: object) -> None:
        """Set a deadline for the connection's new state; None for no deadline."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None or then is None else self.loop.call_later(seconds, then, *args)

    # -- the reader -------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader is not None and self._is_answered() and not self._closed:
            self._reader.stop()

    def _watch_reader(self) -> None:
        if (self._reader is None or self._reader.over) and self.transport.get_write_buffer_size():
            self._reader = SlowReader(self.loop, self.transport, self.limits.reading)

    def _wrote(self, count: int) -> None:
        if self._reader is not None:
            self._reader.wrote(count)

    def eof_received(self) -> None:
        """Close after the written data has been sent."""
        self._watch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed, self._rest = True, b""
        self._within(None)
        if self._reader is not None:
            self._reader.stop()
        super().connection_lost(exc)
