"""One HTTP connection: uvicorn's, with limits, deadlines, and bodies that arrive where they are used.

    waiting     a head must be complete within the limits of `farstep_service.limits`, as all that follows
    head        handed to the application
    body        an endpoint that says where it goes gets it there (`receiving.py`); otherwise in pieces, as ASGI has it
    answer      a reader that takes nothing for long is cut off, so that it cannot hold a version for ever
    idle        uvicorn's keep-alive

A request begins when all that came with its head has been read, and goes as far as it can without waiting: a small push
is answered before the event loop turns, and never becomes a task (`farstep_service.hosts.eager`).

What uvicorn decides about messages stays its own; this only adds what it leaves out.
"""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import chain
from typing import Any, cast

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application, HTTPScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from farstep.errors import FarstepError, InvalidRequest, LimitExceeded
from farstep_service.hosts import begin
from farstep_service.limits import CONNECTION
from farstep_service.routes import PROBLEM, RECEIVE_INTO, Pace, Sink, problem_of
from farstep_service.server.answering import Answering
from farstep_service.server.parsing import Parser
from farstep_service.server.receiving import Reading
from farstep_service.server.repeated import Head

LOOKS = 4
"""How often within the time for which a reader may take nothing its progress is looked at."""
HEADERS_TOO_LARGE = 431


class Protocol(HttpToolsProtocol):
    """Speak HTTP/1.1 on one connection; `uvicorn.Config(http=Protocol)`."""

    limits = CONNECTION

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0
    _refused = False
    _occupied = False
    _between = True
    _head: Head | None = None
    _next: tuple[RequestResponseCycle, ASGI3Application] | None = None

    # -- the head ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.parser = Parser(self)  # type: ignore[assignment]
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._between and self._head is not None and self._head.begins(data) and self._is_idle():
            self._repeat(self._head, data)
            return
        begun = data if self._between else None
        self._occupied = True
        super().data_received(data)
        self._occupied = False
        if begun is not None and self._between and self._next is not None and not self.pipeline:
            self._head = Head.of(begun, cast("dict[str, Any]", self.scope))
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.head.most_bytes:
                most = self.limits.head.most_bytes
                self._refuse_head(f"The request's head has more than {most} bytes.", most)
        if self._next is not None:
            self._begin_next()

    def _is_idle(self) -> bool:
        """Say whether the request before is answered."""
        return self.cycle.response_complete and self.limit_concurrency is None and not self.transport.is_closing()

    def _repeat(self, head: Head, body: bytes) -> None:
        """Begin a request whose head came before, and which is complete."""
        self._unset_keepalive_if_required()
        scope = head.scope()
        self.cycle = RequestResponseCycle(
            scope=cast(HTTPScope, scope),
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=True,
            on_response=self.on_response_complete,
        )
        scope |= {"state": self.app_state.copy(), "extensions": {RECEIVE_INTO: partial(self._receive_into, self.cycle)}}
        self.cycle.body += memoryview(body)[len(head.raw) :]
        self.cycle.more_body = False
        self.cycle.message_event.set()
        self._start_asgi_task(self.cycle, cast(ASGI3Application, self.app))

    def on_message_begin(self) -> None:
        self._between = False
        super().on_message_begin()
        if not self._in_head:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._head_timer = _cancelled(self._head_timer)
        size = len(self.url) + sum(map(len, chain.from_iterable(self.headers)))
        limit = self.limits.head
        if size > limit.most_bytes or len(self.headers) > limit.most:
            self._refuse_head(
                f"The request's head has {len(self.headers)} headers and {size} bytes.",
                limit.most if len(self.headers) > limit.most else limit.most_bytes,
            )
            return
        super().on_headers_complete()
        # The next request may be parsed before this one is answered, so the cycle is bound.
        cast("dict[str, Any]", self.scope)["extensions"] = {RECEIVE_INTO: partial(self._receive_into, self.cycle)}

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._between = True
        if not self._refused:
            super().on_message_complete()

    def _await_head(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        self._head_timer = _cancelled(self._head_timer)
        self._head_timer = self.loop.call_later(self.limits.head.within_s, self._head_is_late)

    def _head_is_late(self) -> None:
        if self._head_bytes == 0:
            self.transport.close()  # it never asked anything
            return
        late = InvalidRequest(
            f"The request's head was not complete after {self.limits.head.within_s:g} s.", remedy="Send it in one go."
        )
        self._answer_and_close(408, late)

    def _refuse_head(self, detail: str, limit: int) -> None:
        self._answer_and_close(HEADERS_TOO_LARGE, LimitExceeded(detail, limit=limit))

    def _answer_and_close(self, status: int, error: FarstepError) -> None:
        self._refused = True
        self._head_timer = _cancelled(self._head_timer)
        if self.transport.is_closing():
            return
        body = problem_of(error, status=status)
        head = f"HTTP/1.1 {status} \r\ncontent-length: {len(body)}\r\nconnection: close\r\ncontent-type: "
        self.transport.write(head.encode() + PROBLEM + b"\r\n\r\n" + body)
        self.transport.close()

    # -- the body ---------------------------------------------------------------------------------------------------

    async def _receive_into(self, cycle: RequestResponseCycle, sink: Sink, size: int, pace: Pace) -> None:
        """Receive the body of a request, `size` bytes, into the memory a sink names.

        Raises:
            ClientDisconnect: the connection is gone.
            FarstepError: what the sink raises, or `Truncated` when the body comes too slowly. The rest of the body is
                read and dropped, so that the client reads the answer.
        """
        if cycle.disconnected:
            raise ClientDisconnect
        begun, cycle.body = cycle.body, bytearray()
        if not cycle.more_body:
            sink.feed(begun)
            return
        if cycle.waiting_for_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        reading = Reading(self.transport, sink, size - len(begun), pace, self._body_is_over, self.connection_lost)
        self.flow.read_paused = False
        try:
            reading.start()
            sink.feed(begun)
            await reading.wait()
        except BaseException:
            reading.drop()
            raise
        finally:
            del reading  # an error in it and this frame would keep each other

    def _body_is_over(self) -> None:
        """Go on as if the parser had seen the body."""
        self.transport.pause_reading()
        self.transport.set_protocol(self)
        self.transport.resume_reading()
        self.parser = Parser(self)  # type: ignore[assignment]
        self._between = True
        self.cycle.more_body = False
        self.cycle.message_event.set()

    # -- the answer -------------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._next = cycle, app
        if not self._occupied:
            self._begin_next()

    def _begin_next(self) -> None:
        """Answer the request that is next, and those behind it that came early, as far as that needs no waiting."""
        self._occupied = True
        while self._next is not None:
            (cycle, app), self._next = self._next, None
            answering = Answering(cast(ASGIApp, app), cycle, self.transport)
            cycle.transport = cast(asyncio.Transport, answering)
            task = begin(self.loop, cycle.run_asgi(cast(ASGI3Application, answering)))
            if task is not None:
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
        self._occupied = False

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._watch(self.transport.get_write_buffer_size(), LOOKS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall_timer = _cancelled(self._stall_timer)

    def _watch(self, left: int, looks: int) -> None:
        self._stall_timer = self.loop.call_later(self.limits.reading.silent_s / LOOKS, self._look, left, looks)

    def _look(self, left: int, looks: int) -> None:
        now = self.transport.get_write_buffer_size()
        if now != left:
            self._watch(now, LOOKS)
        elif looks > 1:
            self._watch(now, looks - 1)
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _cancelled(self._head_timer)
        self._stall_timer = _cancelled(self._stall_timer)
        super().connection_lost(exc)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer and return what takes its place."""
    if timer is not None:
        timer.cancel()
    return None
