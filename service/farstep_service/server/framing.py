"""The framing of requests: the ends of heads and bodies, without I/O.

    Heading     empty lines, a request line, headers, an empty line
    Sized       Content-Length: the next `left` bytes
    Chunked     a line with a size, content of that size, an empty line, and so on; a last chunk of no size, trailers,
                an empty line

Everything around the content has a limit: a chunk's line and its extensions, the number of small chunks, trailers.
Extensions and trailers are dropped: a request describes itself in its head.
"""

from __future__ import annotations

import re
from typing import ClassVar, final

from farstep.errors import InvalidRequest, LimitExceeded, UnsupportedMedia
from farstep_service.limits import ConnectionLimits

SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n")
EMPTY = b"\r\n"
END = b"\r\n\r\n"
"""The end of a head; the parser accepts no other."""
WORTH_BYTES = 64
"""The content from which a chunk does not count as small."""


@final
class Heading:
    """The head of a request, after optional empty lines.

    Args:
        limits: of both.

    Attributes:
        received: bytes of the head that have arrived.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self.received = 0
        self._limits = limits
        self._blank_bytes = 0
        self._tail = b""

    def take(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Return the part of the head in `data`, and the bytes behind it; None if the end has not arrived.

        Raises:
            InvalidRequest: only empty lines arrive.
            LimitExceeded: the head is too large.
        """
        if not self.received:
            begins = data.lstrip(EMPTY)
            self._blank_bytes += len(data) - len(begins)
            if self._blank_bytes > self._limits.blank.most_bytes:
                raise InvalidRequest("Empty lines come where a request should.")
            data = begins
        end = self._end(data)
        head, rest = (data[:end], data[end:]) if end else (data, None)
        self.received += len(head)
        most = self._limits.head.most_bytes
        if self.received > most:
            raise LimitExceeded(f"The request's head has more than {most} bytes.", limit=most)
        return head, rest

    def _end(self, data: bytes) -> int:
        """Return the position in `data` where the head ends, 0 if its end has not arrived."""
        seam = (self._tail + data[: len(END) - 1]).find(END)
        if seam >= 0:
            return seam + len(END) - len(self._tail)
        self._tail = (self._tail + data[1 - len(END) :])[1 - len(END) :]
        return data.find(END) + len(END) if END in data else 0


@final
class Sized:
    """A body of announced length.

    Attributes:
        left: bytes that have not arrived.
        received: bytes of its content that have arrived.
    """

    announced: ClassVar[bool] = True

    def __init__(self, size: int) -> None:
        self.left = size
        self.received = 0

    @property
    def over(self) -> bool:
        """Return whether all of it has arrived."""
        return self.left == 0

    def take(self, data: bytes) -> tuple[list[memoryview], int]:
        """Return the content in `data`, and how many of its bytes belong to this body."""
        count = min(self.left, len(data))
        self.took(count)
        return [memoryview(data)[:count]] if count else [], count

    def took(self, count: int) -> None:
        """Take note of content that was received elsewhere, at most `left` bytes."""
        self.left -= count
        self.received += count


@final
class Chunked:
    """A body in chunks.

    Args:
        limits: the limits of the data around its content.

    Attributes:
        left: bytes of content that follow in the present chunk.
        received: bytes of content that have arrived.
        over: whether its end has arrived.
    """

    announced: ClassVar[bool] = False

    def __init__(self, limits: ConnectionLimits) -> None:
        self.left = 0
        self.received = 0
        self.over = False
        self._limits = limits
        self._line = b""
        self._read = self._size
        self._most_bytes = limits.chunk.most_bytes
        self._chunks = 0
        self._trailers = 0

    def take(self, data: bytes) -> tuple[list[memoryview], int]:
        """Return the content in `data`, and how many of its bytes belong to this body.

        Raises:
            InvalidRequest, LimitExceeded: the framing is invalid, so the start of the next request is unknown.
        """
        view, pieces, at = memoryview(data), [], 0
        while at < len(data) and not self.over:
            if self.left:
                piece = view[at : at + self.left]
                pieces.append(piece)
                at += len(piece)
                self.took(len(piece))
                continue
            room = self._most_bytes - len(self._line)
            end = data.find(b"\n", at, at + room) + 1
            self._line += data[at : end or at + room]
            if not end and len(data) - at >= room:
                if self._read == self._end_of_chunk:
                    raise _ill_framed("A chunk does not end where its size says.")
                raise LimitExceeded(
                    f"What stands around a chunk, or behind the last one, has more than {self._most_bytes} bytes.",
                    limit=self._most_bytes,
                    field="transfer-encoding",
                )
            at = end or len(data)
            if end:
                line, self._line = self._line, b""
                self._read(line)
        return pieces, at

    def took(self, count: int) -> None:
        """Take note of content that was received elsewhere, at most `left` bytes."""
        self.left -= count
        self.received += count
        if not self.left:
            self._read, self._most_bytes = self._end_of_chunk, len(EMPTY)

    def _size(self, line: bytes) -> None:
        found = SIZE.fullmatch(line)
        if found is None:
            raise _ill_framed("A chunk does not begin with its size.")
        self.left = int(found[1], 16)
        if not self.left:
            self._read, self._most_bytes = self._trailer, self._limits.trailers.most_bytes
            return
        self._chunks += 1
        most = self._limits.chunk.most
        if self._chunks - self.received // WORTH_BYTES > most:
            raise LimitExceeded(
                f"The body comes in more than {most} small chunks.", limit=most, field="transfer-encoding"
            )

    def _end_of_chunk(self, line: bytes) -> None:
        if line != EMPTY:
            raise _ill_framed("A chunk does not end where its size says.")
        self._read, self._most_bytes = self._size, self._limits.chunk.most_bytes

    def _trailer(self, line: bytes) -> None:
        if line == EMPTY:
            self.over = True
            return
        if not TRAILER.fullmatch(line):
            raise _ill_framed("What follows the last chunk is not a trailer.")
        self._trailers += 1
        self._most_bytes -= len(line)
        most = self._limits.trailers.most
        if self._trailers > most or self._most_bytes <= 0:
            raise LimitExceeded(f"More than {most} trailers follow the body.", limit=most, field="transfer-encoding")


Framing = Sized | Chunked


def framing_of(headers: list[tuple[bytes, bytes]], limits: ConnectionLimits) -> Framing:
    """Return the framing of a request's body, from headers that httptools has accepted.

    Raises:
        UnsupportedMedia: the body has another transfer encoding than chunked.
    """
    for name, value in headers:
        if name == b"content-length":
            return Sized(int(value))
        if name == b"transfer-encoding":
            if value.strip().lower() != b"chunked":
                raise UnsupportedMedia(
                    f"Transfer-Encoding is {value.decode('latin-1')!r:.80}; only chunked is supported.",
                    field="transfer-encoding",
                )
            return Chunked(limits)
    return Sized(0)


def _ill_framed(detail: str) -> InvalidRequest:
    return InvalidRequest(detail, field="transfer-encoding")
