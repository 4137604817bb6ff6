"""A request body keeps its buffers, and loses nothing in whichever way it is sent."""

from array import array
from collections.abc import Generator

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farstep.protocol.memory import tensor_memory
from farstep.transport import Batch, BufferedBody, StreamedBody
from farstep.transport.pieces import SLICE_BYTES, Cursor

BUFFERS = st.lists(st.binary(max_size=40) | st.integers(0, 40).map(bytes), max_size=12)


@given(BUFFERS)
def test_iterating_yields_every_byte(buffers: list[bytes]):
    """The slices that other transports see are the buffers one after the other, empty and all-zero ones included."""
    pieces = BufferedBody([memoryview(bytearray(each)) for each in buffers])
    assert b"".join(pieces) == b"".join(buffers)
    assert pieces.nbytes == len(b"".join(buffers))


def test_a_large_buffer_is_iterated_in_slices():
    """No slice is larger than 1 MiB, because other transports copy what they are given."""
    pieces = BufferedBody([bytes(3 * SLICE_BYTES + 5)])
    assert [len(each) for each in pieces] == [SLICE_BYTES] * 3 + [5]


def test_a_body_can_be_iterated_again():
    """A second sending carries the same bytes as the first."""
    pieces = BufferedBody([b"ab", b"c"])
    assert list(pieces) == list(pieces)


def test_elements_of_any_type_are_bytes():
    """A view of wider elements or several dimensions counts and is sent as its bytes."""
    values = memoryview(bytearray(range(24))).cast("i", (2, 3))
    assert BufferedBody([values]).nbytes == 24
    assert b"".join(BufferedBody([values])) == bytes(range(24))


def test_buffers_are_not_copied():
    """The views of a body are the memory it was made of."""
    memory = bytearray(b"before")
    pieces = BufferedBody([memory])
    memory[:] = b"after!"
    assert b"".join(pieces) == b"after!"


def test_a_tensor_is_kept_alive():
    """A body made of a tensor's memory holds the tensor."""
    pieces = BufferedBody([tensor_memory(torch.arange(1000, dtype=torch.float32))])
    torch.full((1000,), -1.0)  # would take over the memory
    assert b"".join(pieces) == array("f", range(1000)).tobytes()


def test_a_buffer_with_gaps_is_refused():
    """A strided buffer has no bytes to send from, and the message says which one it is and what to do."""
    with pytest.raises(ValueError, match=r"Invalid buffer 1: it is not contiguous\. Make a contiguous copy"):
        BufferedBody([b"ab", memoryview(b"abcdef")[::2]])


@given(st.lists(BUFFERS, max_size=5))
def test_a_supply_yields_every_byte_each_time(batches: list[list[bytes]]):
    """A body that is made while it is sent is made anew each time, empty batches and zeros included."""

    def begin() -> Generator[Batch]:
        yield from batches

    body = b"".join(b"".join(each) for each in batches)
    supply = StreamedBody(begin, len(body))
    assert supply.whole == (not body)
    for _ in range(2):
        assert b"".join(supply) == body
    assert supply.whole


@pytest.mark.parametrize(
    ("stated", "message"), [(3, "more than 3 bytes"), (5, "has 4 bytes, but it was said to have 5")]
)
def test_a_supply_of_another_size_is_refused(stated: int, message: str):
    """A body that is not as long as its head says is an error, and nothing beyond that length is handed out."""

    def begin() -> Generator[Batch]:
        yield [b"ab"]
        yield [b"cd"]

    supply, handed_out = StreamedBody(begin, stated), list[bytes]()
    with pytest.raises(httpx.LocalProtocolError, match=message):
        list(map(handed_out.append, supply))
    assert len(b"".join(handed_out)) <= stated
    assert not supply.whole


def test_a_supply_that_is_given_up_is_closed():
    """Whoever makes a body learns that nobody wants the rest of it."""
    closed = []

    def begin() -> Generator[Batch]:
        try:
            yield [b"a"]
            yield [b"b"]
        finally:
            closed.append(True)

    supply = StreamedBody(begin, 2)
    batches = supply.batches()
    next(batches)
    batches.close()
    assert closed == [True]
    assert not supply.whole


@given(BUFFERS, st.integers(1, 5), st.data())
def test_partial_sends_lose_and_repeat_nothing(buffers: list[bytes], width: int, data: st.DataObject):
    """Whatever part of each window the kernel takes, what it took in all is the body."""
    cursor = Cursor(map(memoryview, buffers), width)
    taken = b""
    while window := cursor.window():
        assert 0 < len(window) <= width
        offered = b"".join(window)
        count = data.draw(st.integers(1, len(offered)))
        taken += offered[:count]
        assert cursor.advance(count) == bool(cursor.window())
    assert taken == b"".join(buffers)


def test_a_request_has_what_the_client_has():
    """`BufferedBody.request` keeps the base URL with its path, the client's headers and its timeouts."""
    with httpx.Client(base_url="http://127.0.0.1:9/prefix/", headers={"X-Own": "1"}, timeout=7) as client:
        request = BufferedBody([b"abc"]).request(client, "POST", "/echo", params={"q": 1}, headers={"X-More": "2"})
    assert str(request.url) == "http://127.0.0.1:9/prefix/echo?q=1"
    assert (request.headers["X-Own"], request.headers["X-More"]) == ("1", "2")
    assert request.headers["Content-Length"] == "3"
    assert "Transfer-Encoding" not in request.headers
    assert request.extensions["timeout"]["read"] == 7


def test_a_request_can_have_its_own_timeout():
    """Timeouts given with a request replace the client's, and other extensions are kept."""
    with httpx.Client(timeout=7) as client:
        request = BufferedBody([]).request(
            client, "POST", "http://127.0.0.1:9/", timeout=httpx.Timeout(1, read=2), extensions={"farstep_named": True}
        )
    assert request.extensions["timeout"] == {"connect": 1, "read": 2, "write": 1, "pool": 1}
    assert request.extensions["farstep_named"] is True
