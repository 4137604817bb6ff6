"""An answer's head goes into the same write as the first of its body."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, cast

import pytest
from starlette.types import Message, Receive, Scope, Send

from farstep_service.server.answering import Answering

START: Message = {"type": "http.response.start", "status": 200, "headers": []}


class Wire:
    """A transport that notes what is written at once, and whether it was closed."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def writelines(self, data: Iterable[bytes]) -> None:
        self.writes.append(b"".join(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def answered(*messages: Message, last_close: bool = False, failure: Exception | None = None) -> Wire:
    """Return the wire after an application has sent these messages, through a server that writes each by itself."""
    wire = Wire()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        if failure is not None:
            raise failure

    answering = Answering(application, cast(asyncio.Transport, wire))

    async def send(message: Message) -> None:
        answering.write(b"head " if message["type"] == "http.response.start" else message["body"])
        if last_close and not message.get("more_body", True):
            answering.close()

    async def receive() -> Any:
        raise AssertionError("nobody asked")

    asyncio.run(answering({"type": "http"}, receive, send))
    return wire


def body(content: bytes, *, more: bool = False) -> Message:
    """Return a message with a part of a body."""
    return {"type": "http.response.body", "body": content, "more_body": more}


def test_head_and_body_are_one_write() -> None:
    """A client wakes up once for an answer that is complete."""
    assert answered(START, body(b"all")).writes == [b"head all"]


def test_what_follows_is_written_by_itself() -> None:
    """Later pieces are not joined: they may be large, and their memory is not to be copied."""
    assert answered(START, body(b"one", more=True), body(b"two", more=True), body(b"")).writes == [
        b"head one",
        b"two",
        b"",
    ]


def test_a_connection_that_is_closed_after_an_answer_has_sent_it() -> None:
    """The last write comes before the end."""
    wire = answered(START, body(b"all"), last_close=True)
    assert wire.writes == [b"head all"]
    assert wire.closed


def test_an_application_that_fails_behind_its_head_has_answered_nothing() -> None:
    """The server can still say 500."""
    with pytest.raises(ValueError, match="behind"):
        answered(START, failure=ValueError("behind"))
