"""Request bodies that are buffers, and the position reached while sending some.

    BufferedBody      all buffers exist before
    StreamedBody      buffers are made while the ones before them are sent, anew for each attempt; their size is known
    Payload           what follows a header in a body: memory, or a `StreamedBody`

Tensors lie in memory as separate contiguous blocks. Joining them would copy everything, and httpx itself copies the
unsent rest at every partial send. A body here keeps the blocks in place, and `Cursor` selects those to give to the
kernel next.

Never pass such a buffer to httpx as `content=`: it iterates a memoryview number by number, and zeros vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from operator import attrgetter
from typing import Any, Final, final

import httpx

SLICE_BYTES: Final = 1 << 20
"""The largest `bytes` that iterating a body yields."""

Batch = Sequence[bytes | memoryview]
"""Buffers that are sent together."""


@final
class BufferedBody(httpx.SyncByteStream):
    """A request body of buffers that are sent from their own memory.

    Iterating yields `bytes` of at most 1 MiB, for other transports than `SocketTransport`. A body can be sent any
    number of times; its memory must not change until the answer has arrived.

    Attributes:
        nbytes: the length of the body.
        views: the buffers without the empty ones, as memoryviews of bytes.

    Raises:
        ValueError: a buffer is not C-contiguous.
    """

    def __init__(self, buffers: Iterable[bytes | bytearray | memoryview]) -> None:
        self.views: list[memoryview] = []
        for place, buffer in enumerate(buffers):
            view = memoryview(buffer)
            if not view.c_contiguous:
                raise ValueError(f"Invalid buffer {place}: it is not contiguous. Make a contiguous copy of it first.")
            if view.nbytes:
                self.views.append(view.cast("B"))
        self.nbytes = sum(map(len, self.views))

    def __iter__(self) -> Iterator[bytes]:
        for view in self.views:
            for start in range(0, len(view), SLICE_BYTES):
                yield bytes(view[start : start + SLICE_BYTES])

    def request(
        self,
        client: httpx.Client,
        method: str,
        url: httpx.URL | str,
        *,
        params: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: httpx.Timeout | float | None = None,
        extensions: Mapping[str, Any] | None = None,
    ) -> httpx.Request:
        """Return a request of `client` that carries this body, for `client.send`.

        Args:
            client: gives the base URL, headers, cookies and, where `timeout` is None, the timeouts.
            method: the HTTP method.
            url: absolute, or relative to the client's base URL; an absolute `httpx.URL` saves a third of the time.
            params: the query.
            headers: headers besides the client's.
            timeout: seconds, or httpx's four timeouts.
            extensions: see `farstep.transport.head`.
        """
        kept = dict(extensions or {})
        if timeout is not None:
            kept["timeout"] = httpx.Timeout(timeout).as_dict()
        named = {**(headers or {}), "Content-Length": str(self.nbytes)}
        request = client.build_request(method, url, content=self, params=params, headers=named, extensions=kept)
        request.stream = self  # httpx has wrapped it in an iterator that hides the buffers
        return request


@final
class StreamedBody(httpx.SyncByteStream):
    """A request body that is made while it is sent.

    A batch is requested when the kernel has taken all of the one before it, whose memory may then be reused. An error
    of the iterator aborts the request in the middle of its body and reaches the caller unchanged; the connection is
    closed. Batches may be empty: the first one is sent with the head.

    Args:
        begin: returns all batches; called whenever the body is sent, also when it is sent again.
        nbytes: their exact total length.

    Attributes:
        nbytes: the length of the body.
        whole: it has been made to its end, so that a server may have all of it.
    """

    def __init__(self, begin: Callable[[], Generator[Batch]], nbytes: int) -> None:
        self._begin = begin
        self.nbytes = nbytes
        self.whole = nbytes == 0

    def batches(self) -> Generator[Batch]:
        """Begin to make the body; a caller that does not exhaust the generator closes it.

        Raises:
            httpx.LocalProtocolError: it is longer or shorter than `nbytes`; no more than `nbytes` are yielded.
        """
        left = self.nbytes
        made = self._begin()
        try:
            for batch in made:
                left -= sum(memoryview(each).nbytes for each in batch)
                if left < 0:
                    break
                self.whole = self.whole or not left
                yield batch
        finally:
            made.close()
        if left:
            raise httpx.LocalProtocolError(
                f"The body has {'more than ' if left < 0 else ''}{self.nbytes - max(left, 0)} bytes, "
                f"but it was said to have {self.nbytes}."
            )

    def __iter__(self) -> Iterator[bytes]:
        for batch in self.batches():
            yield from BufferedBody(batch)


@final
class Cursor:
    """The position up to which a list of buffers has been sent.

    Args:
        views: memoryviews of bytes; empty ones are skipped.
        width: the largest number of buffers the kernel takes at once.
    """

    def __init__(self, views: Iterable[memoryview], width: int) -> None:
        self._views = [view for view in views if len(view)]
        self._first = 0
        self._width = width

    def window(self) -> list[memoryview]:
        """Return the buffers to send next, at most `width` of them; none when everything has been sent."""
        return self._views[self._first : self._first + self._width]

    def advance(self, sent_bytes: int) -> bool:
        """Move past `sent_bytes` bytes of the window; return whether anything is left."""
        while sent_bytes:
            view = self._views[self._first]
            if sent_bytes < len(view):
                self._views[self._first] = view[sent_bytes:]
                return True
            sent_bytes -= len(view)
            self._first += 1
        return self._first < len(self._views)


Payload = Sequence[memoryview] | StreamedBody
_NBYTES: Final = attrgetter("nbytes")


def nbytes_of(payload: Payload) -> int:
    """Return the size of a payload, without making it."""
    return payload.nbytes if isinstance(payload, StreamedBody) else sum(map(_NBYTES, payload))


def batches_of(payload: Payload) -> Generator[Batch]:
    """Yield the batches of a payload, which are made now if it is streamed."""
    if not isinstance(payload, StreamedBody):
        yield payload
        return
    with closing(payload.batches()) as batches:
        yield from batches


def never_sent(payload: Payload) -> bool:
    """Return whether a server cannot have all of a payload, because it was never completed."""
    return isinstance(payload, StreamedBody) and not payload.whole
