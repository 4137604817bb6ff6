"""Bodies: a request is streamed into its final memory, and an answer sent from the memory of a held version.

Nothing is joined, and nothing is allocated because of a client's claim: a body's expected size follows from the
session's layout, and a `Content-Length` that does not fit is refused before memory is allocated.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import xxhash
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from farstep.errors import InvalidRequest, LimitExceeded, Truncated, UnsupportedMedia
from farstep.protocol import CONTENT_TYPE, Decoder, encode
from farstep_service.limits import CONNECTION
from farstep_service.sessions import AtMost, Outgoing
from farstep_service.sessions.coroutines import in_task

MSGPACK = CONTENT_TYPE.encode()
TAIL_BYTES = 128 * 1024
"""Size of the copied end of an answer. uvicorn reports a write as drained while up to 16 KiB are left in its buffer,
which must not be memory that the next step writes to."""

BuffersFor = Callable[[dict[str, Any], int], Sequence[memoryview]]
"""Given the header and the size of the body, `AtMost` for one in chunks, returns the memory for the payload."""


RECEIVE_INTO = "farstep.receive_into"
"""The ASGI extension of a server that receives bodies into given memory: `await it(sink, size, pace)`."""

OUTGOING = "farstep.outgoing"
"""The ASGI extension of a server that reports the progress of an answer, and can cut it: an `Outgoing`."""


def outgoing_of(scope: Scope) -> Outgoing | None:
    """Return the `Outgoing` of a request's answer, if the server has it."""
    found: Outgoing | None = (scope.get("extensions") or {}).get(OUTGOING)
    return found


@dataclass(frozen=True, slots=True)
class Pace:
    """The least pace of a body.

    Attributes:
        idle_s: the most seconds of silence.
        bytes_per_s: the least rate overall.
    """

    idle_s: float
    bytes_per_s: float = CONNECTION.body.least_bytes_per_s

    def allowed_s(self, received: int) -> float:
        """Return the seconds that `received` bytes may take."""
        return self.idle_s + received / self.bytes_per_s

    def too_slow(self, received: int, size: int | None, elapsed_s: float, *, silent: bool) -> Truncated | None:
        """Return the error for a body that is too slow, None otherwise.

        Args:
            size: its length, None if that is not known.
        """
        arrived = f"{received} bytes" if size is None else f"{received} of {size} bytes"
        if silent:
            return Truncated(
                f"No byte of the body came for {self.idle_s:g} s; {arrived} had arrived.", limit=self.idle_s
            )
        if elapsed_s > self.allowed_s(received):
            return Truncated(f"The body comes too slowly: {arrived} in {elapsed_s:.0f} s.", limit=self.bytes_per_s)
        return None


class Sink(Protocol):
    """The receiver of a body, such as `farstep.protocol.Decoder`."""

    def get_buffer(self) -> memoryview:
        """Return memory for the next bytes."""

    def buffer_updated(self, count: int) -> None:
        """Record the number of bytes written to it."""

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take bytes from other memory."""


@dataclass(frozen=True, slots=True)
class Body:
    """A complete body: its header, the xxh3_128 of its payload, and the fingerprint of both."""

    header: dict[str, Any]
    digest: bytes
    fingerprint: str


class _Message:
    """An incoming message, and its fingerprint."""

    def __init__(
        self,
        buffers_for: Callable[[dict[str, Any]], Sequence[memoryview]],
        arrived: Callable[[int], None],
        most_bytes: int,
    ) -> None:
        self._digest = xxhash.xxh3_128()
        self._decoder = Decoder(buffers_for, placed=self._digest.update)
        self._arrived = arrived
        self._most_bytes = self._left = most_bytes

    def get_buffer(self) -> memoryview:
        return self._decoder.get_buffer()

    def buffer_updated(self, count: int) -> None:
        self._count(count)
        self._decoder.buffer_updated(count)
        self._arrived(self._decoder.received)

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        self._count(len(chunk))
        self._decoder.feed(chunk)
        self._arrived(self._decoder.received)

    def close(self) -> Body:
        """Return the message; raise if it is incomplete."""
        self._decoder.close()
        digest = self._digest.digest()
        whole = xxhash.xxh3_128(repr(self._decoder.header).encode())
        whole.update(digest)
        return Body(self._decoder.header, digest, whole.hexdigest())

    def _count(self, count: int) -> None:
        self._left -= count
        if self._left < 0:  # a server enforces an announced length itself
            raise LimitExceeded(
                f"The body has more than {self._most_bytes} bytes.", field="transfer-encoding", limit=self._most_bytes
            )


def _ignored(received: int) -> None:
    """Do nothing."""


async def read_body(
    scope: Scope,
    receive: Receive,
    buffers_for: BuffersFor,
    *,
    largest: int,
    pace: Pace,
    arrived: Callable[[int], None] = _ignored,
) -> Body:
    """Receive one message into the memory of `buffers_for`.

    Args:
        arrived: called with the number of payload bytes that have arrived.
        largest: the largest size of a body.
        pace: its least pace.

    Raises:
        InvalidRequest: the body is not a message of the protocol, or was cut off, or stalled.
        ClientDisconnect: the connection is gone.
        FarstepError: raised by `buffers_for`.
    """
    size = declared(scope, MSGPACK, largest)
    announced = AtMost(largest) if size is None else size
    message = _Message(lambda header: buffers_for(header, announced), arrived, announced)
    receive_into = scope.get("extensions", {}).get(RECEIVE_INTO)
    if receive_into is not None:
        await receive_into(message, size, pace)
    else:
        async for chunk in chunks(receive, size, pace):
            message.feed(chunk)
    return message.close()


async def chunks(receive: Receive, size: int | None, pace: Pace) -> AsyncIterator[bytes]:
    """Receive a body piece by piece, from any ASGI server; `size` is its length, None if unknown.

    Raises:
        Truncated: it is too slow.
        ClientDisconnect: the connection is gone.
    """
    await in_task()
    began = asyncio.get_running_loop().time()
    received = 0
    more = True
    while more:
        silent = False
        try:
            async with asyncio.timeout(pace.idle_s):
                message = await receive()
        except TimeoutError:
            silent = True
        elapsed_s = asyncio.get_running_loop().time() - began
        if error := pace.too_slow(received, size, elapsed_s, silent=silent):
            raise error from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        received += len(chunk)
        yield chunk


def declared(scope: Scope, wanted: bytes, largest: int) -> int | None:
    """Return the length of an uncompressed body of a content type; None for one in chunks.

    Raises:
        UnsupportedMedia: another content type, or an encoding.
        InvalidRequest: it has no length, and is not in chunks.
        LimitExceeded: it is longer than `largest`.
    """
    headers: Mapping[bytes, bytes] = dict(scope["headers"])
    kind = headers.get(b"content-type", b"")
    if kind != wanted:
        raise UnsupportedMedia(
            f"Content-Type is {kind.decode('latin-1')!r:.80}; this route takes {wanted.decode()}.",
        )
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise UnsupportedMedia("Content-Encoding is not supported; send the body as it is.", field="content-encoding")
    declared = headers.get(b"content-length", b"")
    if not declared and headers.get(b"transfer-encoding", b"").strip().lower() == b"chunked":
        return None
    if not declared.isdigit():
        raise InvalidRequest(
            "The request has no Content-Length.",
            remedy="Send the body with its length, or in chunks.",
            field="content-length",
        )
    if int(declared) > largest:
        raise LimitExceeded(f"The body has {int(declared)} bytes.", field="content-length", limit=largest)
    return int(declared)


async def answer_message(
    send: Send, header: Mapping[str, Any], payload: Sequence[memoryview], *, status: int = 200
) -> None:
    """Answer with a message; after this returns, `payload` may change."""
    await answer_pieces(send, MSGPACK, encode(header, payload), status=status)


async def answer_pieces(
    send: Send,
    kind: bytes,
    pieces: list[bytes | memoryview],
    *,
    status: int = 200,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Answer with a body in pieces; after this returns, their memory may change."""
    size = 0
    for piece in pieces:
        size += len(piece) if isinstance(piece, bytes) else piece.nbytes
    told = [(b"content-type", kind), (b"content-length", str(size).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": told})
    if size <= TAIL_BYTES:
        await send({"type": "http.response.body", "body": b"".join(pieces)})
        return
    body, tail = _split(pieces)
    heads = len(list(takewhile(lambda piece: isinstance(piece, bytes), body)))
    for piece in [b"".join(body[:heads]), *body[heads:]]:
        await _write(send, piece)
    await _write(send, tail)
    await send({"type": "http.response.body", "body": b""})


def _split(pieces: list[bytes | memoryview]) -> tuple[list[bytes | memoryview], bytes]:
    """Split off the last `TAIL_BYTES`, as a copy."""
    tail: list[bytes] = []
    missing = TAIL_BYTES
    while missing:
        last = memoryview(pieces.pop())
        cut = max(0, last.nbytes - missing)
        tail.append(bytes(last[cut:]))
        missing -= last.nbytes - cut
        if cut:
            pieces.append(last[:cut])
    return pieces, b"".join(reversed(tail))


def _write(send: Send, piece: bytes | memoryview) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": piece, "more_body": True})
