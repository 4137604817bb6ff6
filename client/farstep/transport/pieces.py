"""A request body that is a list of buffers, and the place reached while sending one.

Tensors lie in memory as separate contiguous blocks. Joining them costs a copy of everything, and httpx as it comes
copies the unsent rest again at every partial send. `Pieces` keeps the blocks where they are; `Cursor` says which of
them the kernel should be given next.

Never give such a buffer to httpx as `content=`: it iterates a memoryview number by number, and zeros vanish.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, final

import httpx

SLICE_BYTES: Final = 1 << 20
"""The largest `bytes` that iterating a body yields."""


@final
class Pieces(httpx.SyncByteStream):
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
            extensions: see `farstep.transport.extensions`.
        """
        kept = dict(extensions or {})
        if timeout is not None:
            kept["timeout"] = httpx.Timeout(timeout).as_dict()
        named = {**(headers or {}), "Content-Length": str(self.nbytes)}
        request = client.build_request(method, url, content=self, params=params, headers=named, extensions=kept)
        request.stream = self  # httpx has wrapped it in an iterator that hides the buffers
        return request


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

    @property
    def done(self) -> bool:
        """Tell whether everything has been sent."""
        return self._first == len(self._views)

    def window(self) -> list[memoryview]:
        """Return the buffers to send next, at most `width` of them."""
        return self._views[self._first : self._first + self._width]

    def advance(self, sent_bytes: int) -> None:
        """Move past `sent_bytes` bytes of the window."""
        while sent_bytes:
            view = self._views[self._first]
            if sent_bytes < len(view):
                self._views[self._first] = view[sent_bytes:]
                return
            sent_bytes -= len(view)
            self._first += 1
