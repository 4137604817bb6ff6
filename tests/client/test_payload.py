"""Payloads that are made while they are sent, on the wire like those that are there."""

from __future__ import annotations

from collections.abc import Generator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farstep.conversation import Conversation
from farstep.protocol import CONTENT_TYPE
from farstep.protocol.packing import pack_header
from farstep.transport import Batch, StreamedBody
from farstep.transport.pieces import Payload

BATCHES = st.lists(st.lists(st.binary(max_size=30), max_size=4), max_size=4)


def body_of_push(payload: Payload) -> bytes:
    """Return the body of the request that carries a payload."""
    bodies: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        assert request.headers["content-length"] == str(len(bodies[-1]))
        return httpx.Response(200, headers={"content-type": CONTENT_TYPE}, content=pack_header({}))

    server = Conversation("http://127.0.0.1", None, transport=httpx.MockTransport(answer))
    server.data("POST", "/", {"v": 1}, payload, lambda header: [])
    return bodies[0]


@given(BATCHES)
def test_how_a_payload_is_made_does_not_show(batches: list[list[bytes]]) -> None:
    """The body has the same bytes, whether its payload is there or made batch by batch."""

    def begin() -> Generator[Batch]:
        yield from batches

    there = [memoryview(each) for batch in batches for each in batch]
    made = StreamedBody(begin, sum(map(len, there)))
    assert body_of_push(made) == body_of_push(there)


def test_an_error_in_making_a_payload_reaches_the_caller() -> None:
    """What goes wrong while a payload is made is raised as it is."""

    def begin() -> Generator[Batch]:
        yield [b"a"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body_of_push(StreamedBody(begin, 2))
