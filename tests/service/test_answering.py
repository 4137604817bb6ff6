"""An answer's head goes into the same write as the first of its body."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterable
from typing import cast
from weakref import ref

import pytest
from starlette.types import Message, Receive, Scope, Send
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from farstep_service.server.answering import Answering


def start(length: int | None = None, status: int = 200, **more: str) -> Message:
    """Return the beginning of an answer."""
    headers = {} if length is None else {"content-length": str(length)}
    named = [(name.encode(), value.encode()) for name, value in {**headers, **more}.items()]
    return {"type": "http.response.start", "status": status, "headers": named}


class Wire:
    """A transport that notes what is written at once, and whether it was closed."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False
        self.buffered = True

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def writelines(self, data: Iterable[bytes]) -> None:
        self.writes.append(b"".join(data))
        self.at_once = not self.buffered

    def set_write_buffer_limits(self, high: int | None = None) -> None:
        self.buffered = high != 0

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def answered(
    *messages: Message, method: str = "POST", keep_alive: bool = True, failure: Exception | None = None
) -> tuple[Wire, RequestResponseCycle]:
    """Return the wire, and uvicorn's view of the request, after an application has sent these messages."""
    wire = Wire()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        if failure is not None:
            raise failure

    async def talk() -> RequestResponseCycle:
        transport = cast(asyncio.Transport, wire)
        cycle = RequestResponseCycle(
            scope=cast(HTTPScope, {"type": "http", "method": method, "http_version": "1.1"}),
            transport=transport,
            flow=FlowControl(transport),
            logger=logging.getLogger("test"),
            access_logger=logging.getLogger("test"),
            access_log=False,
            default_headers=[],
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=keep_alive,
            on_response=lambda: None,
        )
        cast(Scope, cycle.scope)["extensions"] = {"of": cycle}
        answering = Answering(application, cycle, transport)
        cycle.transport = cast(asyncio.Transport, answering)
        await answering(cast(Scope, cycle.scope), cast(Receive, cycle.receive), cast(Send, cycle.send))
        return cycle

    return wire, asyncio.run(talk())


def body(content: bytes, *, more: bool = False) -> Message:
    """Return a message with a part of a body."""
    return {"type": "http.response.body", "body": content, "more_body": more}


HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n"


def test_head_and_body_are_one_write():
    """A client wakes up once for an answer that is complete."""
    wire, cycle = answered(start(3), body(b"all"))
    assert wire.writes == [HEAD + b"all"]
    assert wire.at_once
    assert wire.buffered
    assert cycle.response_complete
    assert not wire.closed


@pytest.mark.parametrize(
    ("method", "keep_alive", "head", "sent"),
    [
        ("HEAD", True, start(3), HEAD),
        ("POST", False, start(3), HEAD[:-2] + b"connection: close\r\n\r\nall"),
        ("POST", True, start(3, connection="close"), HEAD[:-2] + b"connection: close\r\n\r\nall"),
        ("POST", True, start(), b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nall\r\n0\r\n\r\n"),
    ],
    ids=["without a body", "the last one", "told to be the last one", "of unknown length"],
)
def test_an_unusual_answer_is_as_uvicorn_has_it(method: str, keep_alive: bool, head: Message, sent: bytes):
    """Whatever is about the connection, or where the body ends, is uvicorn's to decide."""
    wire, cycle = answered(head, body(b"all"), method=method, keep_alive=keep_alive)
    assert b"".join(wire.writes) == sent
    assert cycle.response_complete
    assert wire.closed == (b"close" in sent)


@pytest.mark.parametrize("length", [2, 4])
def test_a_length_that_is_not_the_bodys_is_an_error(length: int):
    """It would be read as a part of the next answer, or waited for."""
    with pytest.raises(RuntimeError, match="than Content-Length"):
        answered(start(length), body(b"all"))


def test_a_header_that_would_end_its_line_is_an_error():
    """What follows it would be a header of somebody else's."""
    with pytest.raises(RuntimeError, match="Invalid HTTP header value"):
        answered(start(3, server="a\r\nb: c"), body(b"all"))


def test_what_follows_is_written_by_itself():
    """Later pieces are not joined: they may be large, and their memory is not to be copied."""
    wire, _ = answered(start(6), body(b"one", more=True), body(b"two", more=True), body(b""))
    assert wire.writes == [HEAD.replace(b"3", b"6") + b"one", b"two", b""]


def test_a_connection_that_is_closed_after_an_answer_has_sent_it():
    """The last write comes before the end."""
    wire, _ = answered(start(3), body(b"all"), keep_alive=False)
    assert b"".join(wire.writes).endswith(b"all")
    assert wire.closed


def test_an_application_that_fails_behind_its_head_has_answered_nothing():
    """The server can still say 500."""
    with pytest.raises(ValueError, match="behind"):
        answered(start(3), failure=ValueError("behind"))


def test_an_answered_request_goes_without_the_collector():
    """Nothing in it leads back to it, or a crowd's requests would be what the garbage collector looks at."""
    gc.collect()
    gc.disable()
    try:
        _, cycle = answered(start(3), body(b"all"))
        gone = ref(cycle)
        del cycle
        assert gone() is None
    finally:
        gc.enable()
