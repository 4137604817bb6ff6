"""One HTTP connection: uvicorn's, with limits, deadlines, and bodies that arrive where they are used.

    waiting     nothing has come yet
    head        a request line and headers; the parser sees nothing else, so nothing else can be taken for a header
    body        an endpoint that says where it goes gets it there (`receiving.py`); otherwise in pieces, as ASGI has it
    answering   a reader that takes too little is cut off, so that it cannot hold a version for ever
    dropping    the rest of a body whose request was answered before
    idle        between two requests; or the next has come already, and waits for its turn (`turns.py`)

The limits of each state are a row of `farstep_service.limits`. This module enforces them, together with `receiving.py`,
to which a connection is lent while a body arrives.

A request begins when all data that came with its head has been read, and runs until it first waits: a small push is
answered within the same turn of the event loop, and never becomes a task (`farstep_service.sessions.coroutines`).

uvicorn still decides about messages; this only adds what it leaves out.
"""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import chain
from typing import Any, cast

import httptools
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from farstep.errors import InvalidRequest, LimitExceeded
from farstep_service.routes import ADMITTED, RECEIVE_INTO, Pace, Sink
from farstep_service.server.answering import Answering
from farstep_service.server.connection import Connection
from farstep_service.server.connection_turns import connection_turns
from farstep_service.server.framing import Framing, Heading, Sized, framing_of
from farstep_service.server.parsing import Parser
from farstep_service.server.receiving import BodyReceiver
from farstep_service.server.repeated import RequestHead
from farstep_service.sessions.coroutines import begin

HEADERS_TOO_LARGE = 431


class Protocol(Connection):
    """Speak HTTP/1.1 on one connection; `uvicorn.Config(http=Protocol)`."""

    _heading: Heading | None = None
    _begun = False
    _framing: Framing | None = None
    _drop_bytes = 0
    _paused = False
    _waits = False
    _head: RequestHead | None = None
    _next: tuple[RequestResponseCycle, ASGI3Application] | None = None

    # -- what comes -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.parser = Parser(self)  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._head is not None and not self._rest and self._head.begins(data) and self._is_idle():
            self._repeat(self._head, data)
            return
        self._rest = self._rest + data if self._rest else data
        if not self._waits:
            self._go_on()

    def take_turn(self) -> None:
        """Begin a request that arrived before the one ahead of it was answered."""
        self._waits = False
        if not self._closed:
            self._go_on()

    def _go_on(self) -> None:
        """Process received data up to the start of a request, with the part of its body that has arrived."""
        if self._closed:
            self._rest = b""
            return
        if self._framing is None and self._is_answered():
            self._take_head()
        if self._framing is not None:
            self._take_body(self._framing)
        if self._next is not None:
            self._begin_next()
        self._settle()

    def _settle(self) -> None:
        """Continue reading, unless another request has arrived that must wait for its turn or for an answer."""
        if self._closed:
            return
        early = bool(self._rest)
        if early and self._framing is None and self.cycle.response_complete and not self._waits:
            self._waits = True
            connection_turns(self.loop).wait(self)
        if early != self._paused and not self._lent:
            self._paused = early
            if early:
                self.flow.read_paused = False  # so that uvicorn does not resume reading
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    # -- the head ---------------------------------------------------------------------------------------------------

    def _take_head(self) -> None:
        """Feed the parser the next head, or the part of it that has arrived."""
        heading = self._heading = self._heading or Heading(self.limits)
        try:
            head, rest = heading.take(self._rest)
        except LimitExceeded as exc:
            self._refuse(exc, HEADERS_TOO_LARGE)
            return
        except InvalidRequest as exc:
            self._refuse(exc)
            return
        self._rest = b""
        if not head:
            return
        whole = heading.received == len(head)
        if whole and rest is None:
            self._within(self.limits.head.within_s, self._head_is_late)
        self._feed(head)
        if self._closed or rest is None:
            return
        if not self._begun:
            self._refuse(InvalidRequest("What came is not a request of HTTP/1.1."))
            return
        self._rest = rest
        self._head_is_over(head if whole else b"")

    def _feed(self, head: bytes) -> None:
        """Feed the parser, which calls `on_headers_complete` at the head's end."""
        try:
            self.parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()
        except httptools.HttpParserError as exc:
            why = f": {exc}" if type(exc) is httptools.HttpParserError else ""  # others may hold what came
            self._refuse(InvalidRequest(f"What came is not a request of HTTP/1.1{why}."))

    def _head_is_over(self, whole: bytes) -> None:
        """Determine the framing of the body; `whole` is the head if it came in one piece."""
        self._within(None)
        self._heading, self._begun = None, False
        try:
            framing = framing_of(self.headers, self.limits)
        except InvalidRequest as exc:
            self._next = None
            self._refuse(exc)
            return
        self._framing = framing
        if not framing.over:
            self.parser = Parser(self)  # type: ignore[assignment]  # the old one would wait for a body
        if whole and isinstance(framing, Sized) and framing.left == len(self._rest):
            self._head = RequestHead.of(whole + self._rest, cast("dict[str, Any]", self.scope))

    def on_headers_complete(self) -> None:
        self._begun = True
        limit = self.limits.head
        size = len(self.url) + sum(map(len, chain.from_iterable(self.headers)))
        if size > limit.most_bytes or len(self.headers) > limit.most:
            detail = f"The request's head has {len(self.headers)} headers and {size} bytes."
            most = limit.most if len(self.headers) > limit.most else limit.most_bytes
            self._refuse(LimitExceeded(detail, limit=most), HEADERS_TOO_LARGE)
            return
        super().on_headers_complete()
        # Bind the cycle: the next request may be parsed before this one is answered.
        cast("dict[str, Any]", self.scope)["extensions"] = {RECEIVE_INTO: partial(self._receive_into, self.cycle)}

    def on_message_complete(self) -> None:
        """Do nothing: the framing determines the end of a body."""

    def _head_is_late(self) -> None:
        detail = f"The request's head was not complete after {self.limits.head.within_s:g} s."
        self._refuse(InvalidRequest(detail, remedy="Send it in one go."), 408)

    def _is_idle(self) -> bool:
        """Return whether the previous request is answered."""
        return (
            self.cycle.response_complete
            and self._framing is None
            and self.limit_concurrency is None
            and not self.transport.is_closing()
        )

    def _repeat(self, head: RequestHead, body: bytes) -> None:
        """Begin a complete request whose head is a repetition."""
        self._within(None)
        scope = head.scope()
        self.cycle = head.cycle(self, scope, self.on_response_complete)
        scope |= {"state": self.app_state.copy(), "extensions": {RECEIVE_INTO: partial(self._receive_into, self.cycle)}}
        self.cycle.body += memoryview(body)[len(head.raw) :]
        self.cycle.more_body = False
        self.cycle.message_event.set()
        self._next = self.cycle, cast(ASGI3Application, self.app)
        self._begin_next()

    # -- the body ---------------------------------------------------------------------------------------------------

    def _take_body(self, framing: Framing) -> None:
        """Pass the received part of a body to the endpoint, or drop it if its request was answered."""
        data, self._rest = self._rest, b""
        try:
            pieces, used = framing.take(data)
        except InvalidRequest as exc:
            self._next = None
            self._refuse(exc)
            return
        if self._dropping:
            self._drop_bytes -= used
        else:
            for piece in pieces:
                self.cycle.body += piece
            if len(self.cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
        if framing.over:
            self._body_is_over(data[used:])
        elif self._drop_bytes < 0:
            self.transport.pause_reading()
            self.transport.write_eof()  # not close: the client would lose the answer
        if pieces or framing.over:
            self.cycle.message_event.set()

    def _body_is_over(self, rest: bytes) -> None:
        self._framing = None
        self._rest = rest
        self.cycle.more_body = False
        self._within(None)
        if self._dropping or self.cycle.response_complete:
            self._dropping, self._drop_bytes = False, 0
            self._within(self.limits.idle.within_s, self._close)

    def _look_at_body(self, framing: Framing, began: float, seen: int) -> None:
        """Check that a body in pieces arrives fast enough."""
        limit, now, received = self.limits.body, self.loop.time(), framing.received
        pace = Pace(limit.silent_s, limit.least_bytes_per_s)
        if self.flow.read_paused:  # the endpoint is slow, not the client
            began = now - received / limit.least_bytes_per_s
        elif error := pace.too_slow(received, None, now - began, silent=received == seen):
            self._refuse(error)
            return
        self._within(limit.silent_s, self._look_at_body, framing, began, received)

    async def _receive_into(self, cycle: RequestResponseCycle, sink: Sink, size: int | None, pace: Pace) -> None:
        """Receive the body of a request, of `size` bytes if known, into the memory of a sink.

        Raises:
            ClientDisconnect: the connection is gone.
            FarstepError: the sink's error, `Truncated` for a body that is too slow, or an error of its chunks. The rest
                of the body is read and dropped, so that the client reads the answer.
        """
        if cycle.disconnected:
            raise ClientDisconnect
        begun, cycle.body = cycle.body, bytearray()
        framing = self._framing
        if not cycle.more_body or framing is None:
            sink.feed(begun)
            return
        if cycle.waiting_for_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        left = None if size is None else size - len(begun)
        dropped = self.limits.dropped
        receiver = BodyReceiver(
            self.transport, sink, framing, left, pace, dropped, self._take_back, self.connection_lost
        )
        self.flow.read_paused = False
        self._within(None)
        self._lent = True
        try:
            receiver.start()
            sink.feed(begun)
            await receiver.wait()
        except BaseException:
            cycle.keep_alive &= not receiver.ill_framed
            receiver.drop()
            raise
        finally:
            del receiver  # an error in it and this frame would keep each other alive

    def _take_back(self, rest: bytes) -> None:
        """Take the connection back after a body."""
        self.transport.pause_reading()
        self.transport.set_protocol(self)
        self._lent, self._paused = False, True
        self._body_is_over(rest)
        self.cycle.message_event.set()
        self._settle()

    # -- the answer -------------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._next = cycle, app

    def _begin_next(self) -> None:
        """Run the next request until it first waits."""
        if self._next is None:
            return
        (cycle, app), self._next = self._next, None
        answering = Answering(cast(ASGIApp, app), cycle, self.transport, self._wrote)
        cycle.transport = cast(asyncio.Transport, answering)
        task = begin(self.loop, cycle.run_asgi(cast(ASGI3Application, answering)))
        if task is not None:
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        if self._framing is not None and not (self._lent or self._dropping or self._closed):
            framing = self._framing
            self._within(self.limits.body.silent_s, self._look_at_body, framing, self.loop.time(), framing.received)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._known |= ADMITTED in self.cycle.scope
        self._since = self.loop.time()
        if self.transport.is_closing():
            self._close()
            return
        if self._lent:  # the rest is read and dropped
            return
        self.flow.resume_reading()
        if self._framing is None:
            self._within(self.limits.idle.within_s, self._close)
        else:
            limit = self.limits.dropped if ADMITTED in self.cycle.scope else self.limits.refused
            self._dropping, self._drop_bytes = True, limit.most_bytes
            self._within(limit.within_s, self._close)
        if self._rest:
            self._settle()
