"""Request bodies that are buffers, and the place reached while sending some.

    BufferedBody      all buffers are there
    StreamedBody      they are made while the ones before them are sent, anew each time; their size is known

Tensors lie in memory as separate contiguous blocks. Joining them costs a copy of everything, and httpx as it comes
copies the unsent rest again at every partial send. A body here keeps the blocks where they are; `Cursor` says which of
them the kernel should be given next.

Never give such a buffer to httpx as `content=`: it iterates a memoryview number by number, and zeros vanish.

What follows a header on its way to the server: memory, or what makes it while it is being sent.
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
    """Hold a request body as buffers that are sent from where they lie.

    Iterating yields `bytes` of at most 1 MiB, which is what transports other than `SocketTransport` see. A body can
    be sent any number of times; its memory must not change until the answer is there.

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
    """Make a request body while it is being sent: the connection takes what is there, and what follows is made then.

    A batch is asked for when the kernel has all of the one before it, so that its memory may be used again. An error
    from the iterator ends the request in the middle of its body and reaches the caller as it is; the server has an
    incomplete body then, and the connection is closed. Batches may be empty: the first one is sent with the head.

    Args:
        begin: returns the batches from the first one on; called whenever the body is sent, also to send it again.
        nbytes: their length together, which has to be true.

    Attributes:
        nbytes: the length of the body.
        whole: it has been made to its end, so that somebody may have all of it.
    """

    def __init__(self, begin: Callable[[], Generator[Batch]], nbytes: int) -> None:
        self._begin = begin
        self.nbytes = nbytes
        self.whole = nbytes == 0

    def batches(self) -> Generator[Batch]:
        """Begin to make the body; whoever does not come to its end closes it.

        Raises:
            httpx.LocalProtocolError: there is more or less of it than was said; no more than that is yielded.
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
    """Remember how much of a list of buffers has been sent.

    Args:
        views: memoryviews of bytes; empty ones are passed over.
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
    """Return its size; what is not there yet is not made for it."""
    return payload.nbytes if isinstance(payload, StreamedBody) else sum(map(_NBYTES, payload))


def batches_of(payload: Payload) -> Generator[Batch]:
    """Go through it from its beginning; what is not there yet is made."""
    if not isinstance(payload, StreamedBody):
        yield payload
        return
    with closing(payload.batches()) as batches:
        yield from batches


def never_sent(payload: Payload) -> bool:
    """Return whether a server cannot have had all of it, because it was never all there."""
    return isinstance(payload, StreamedBody) and not payload.whole
