"""The body of a response, read into memory the caller owns.

    Readable          readinto(view) -> how many bytes, 0 at the end
    ├── ResponseBody  from the connection, without a copy in between
    └── Collected     from any other transport's chunks of bytes

A body ends after Content-Length bytes, or with its last chunk, or with the connection. Then its connection goes back
to the pool at once; after an unfinished body it is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol, final

import httpx

from farstep.transport.connection import Connection
from farstep.transport.head import (
    BODY,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MalformedAnswer,
    OversizedAnswer,
    ResponseHead,
    chunk_size,
)
from farstep.transport.pieces import SLICE_BYTES

_ITERATED_BYTES: Final = 65536
FRAMING_PER_BYTE: Final = 16
"""Bytes that may frame one byte of a body in chunks, beside those that a head may have; six are enough for any."""
_NOTHING: Final = memoryview(b"")


class Readable(Protocol):
    """Anything a body can be read from."""

    def readinto(self, view: memoryview, /) -> int:
        """Read at least one byte into `view`, a writable memoryview of bytes, and return how many; 0 at the end."""

    def arrived(self) -> memoryview:
        """Return what has arrived and was not read, where it lies until the next call; it may be nothing."""

    def skip(self, count: int, /) -> None:
        """Count so many bytes of what has arrived as read."""


@final
class ResponseBody(httpx.SyncByteStream):
    """Read the body of the answer that a connection is receiving.

    Attributes:
        length: bytes in all, None when only the end tells.
    """

    def __init__(
        self,
        connection: Connection,
        head: ResponseHead,
        *,
        request: httpx.Request,
        release: Callable[[Connection, bool], None],
        complete: bool,
    ) -> None:
        """Take over the connection.

        Args:
            connection: has just read `head`.
            head: says where the body ends.
            request: named by the errors.
            release: takes the connection back, and whether another request may be sent over it.
            complete: the request was sent to its end; otherwise the connection cannot be used again.
        """
        self.length = head.length
        self._connection = connection
        self._request = request
        self._release = release
        self._reusable = head.reusable and complete
        self._chunked = head.chunked
        self._framing_bytes = 0
        self._begun = False
        self._left = 0 if head.chunked else head.length
        self._received_bytes = 0
        self._over = False
        self._closed = False
        if head.length == 0:
            self._finish(reusable=self._reusable)

    def readinto(self, view: memoryview, /) -> int:
        """Read at least one byte into `view` and return how many; 0 at the end.

        Raises:
            httpx.ReadTimeout: none came in time.
            httpx.ReadError: the connection broke.
            httpx.RemoteProtocolError: the body ended early.
            MalformedAnswer: its chunks are not what HTTP/1.1 says.
            httpx.StreamClosed: the response was closed before.
        """
        if self._over or not len(view):
            return 0
        if self._closed:
            raise httpx.StreamClosed
        try:
            return self._readinto(view)
        except BaseException as exc:
            self._closed = True
            self._release(self._connection, False)
            if isinstance(exc, httpx.RequestError):
                exc.request = self._request
            raise

    def arrived(self) -> memoryview:
        """Return what has arrived beside the head, without a copy; nothing of a body in chunks."""
        if self._over or self._closed or self._chunked or self._left is None:
            return _NOTHING
        return self._connection.arrived()[: self._left]

    def skip(self, count: int, /) -> None:
        """Count so many bytes of what has arrived as read."""
        if count:
            self._connection.skip(count)
            self._note(count)

    def __iter__(self) -> Iterator[bytes]:
        size = _ITERATED_BYTES if self.length is None else min(self.length, SLICE_BYTES)
        view = memoryview(bytearray(size))
        while count := self.readinto(view):
            yield bytes(view[:count])

    def close(self) -> None:
        """Give the connection up, if the body has not been read to its end."""
        if not self._over and not self._closed:
            self._closed = True
            self._release(self._connection, False)

    def _readinto(self, view: memoryview) -> int:
        if self._chunked and not self._left:
            self._left = self._next_chunk()
            if not self._left:
                self._finish(reusable=self._reusable)
                return 0
        count = self._connection.read_into(view if self._left is None else view[: self._left])
        if self._left is None:
            self._received_bytes += count
            if not count:
                self._finish(reusable=False)
            return count
        if not count:
            expected = "a further chunk" if self.length is None else f"{self.length} bytes"
            raise httpx.RemoteProtocolError(
                "peer closed connection without sending complete message body "
                f"(received {self._received_bytes} bytes, expected {expected})"
            )
        self._note(count)
        return count

    def _note(self, count: int) -> None:
        """Take note that so many bytes of a body, or a chunk, of known length were read."""
        self._received_bytes += count
        self._left = (self._left or 0) - count
        if not self._left and not self._chunked:
            self._finish(reusable=self._reusable)

    def _next_chunk(self) -> int:
        if self._begun and self._read_line():
            raise MalformedAnswer("The server sent a chunk that is longer than it said.")
        self._begun = True
        size = chunk_size(self._read_line())
        if not size:
            for _ in range(MAX_HEADERS):
                if not self._read_line():
                    return 0
            raise OversizedAnswer(f"The server sent more than {MAX_HEADERS} trailers.")
        return size

    def _read_line(self) -> bytes:
        """Return the next line of what frames the chunks; the server cannot send such lines for ever."""
        line = self._connection.read_line()
        self._framing_bytes += len(line) + 2
        if self._framing_bytes > MAX_HEAD_BYTES + FRAMING_PER_BYTE * self._received_bytes:
            raise OversizedAnswer(
                f"The server framed {self._received_bytes} bytes of a body with {self._framing_bytes} others."
            )
        return line

    def _finish(self, *, reusable: bool) -> None:
        self._over = True
        self._release(self._connection, reusable)


@final
class Collected:
    """Read from an iterator of bytes, keeping what did not fit."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readinto(self, view: memoryview, /) -> int:
        """Copy at least one byte into `view` and return how many; 0 at the end."""
        while not len(self._rest) and len(view):
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self.skip(count)
        return count

    def arrived(self) -> memoryview:
        """Return what did not fit."""
        return self._rest

    def skip(self, count: int, /) -> None:
        """Count so many bytes of what did not fit as read."""
        self._rest = self._rest[count:]


def body_of(response: httpx.Response) -> Readable:
    """Return the response's body as something to read into memory, whatever transport it came over.

    Args:
        response: of `client.send(request, stream=True)` or `client.stream(...)`; one that httpx has already read
            works too.
    """
    if response.is_stream_consumed:
        return Collected(iter([response.content]))
    body = response.extensions.get(BODY)
    return body if isinstance(body, ResponseBody) else Collected(response.iter_raw())
