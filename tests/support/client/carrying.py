"""Transports that carry requests to where they go, and that a test can see through or have its way with."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from farstep.transport import SocketTransport

UNEQUAL = [(300, 40), (70,), ()]
LARGE_BYTES = 4 * 300 * 40
"""What the first of these parameters has in a body; the others have next to nothing."""


class Carrying(httpx.BaseTransport):
    """Carry requests as they are; who derives from it does something to some of them.

    Attributes:
        armed: whether it is to be done now.
    """

    def __init__(self) -> None:
        self._inner = SocketTransport()
        self.armed = False

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._inner.close()


class Counting(Carrying):
    """Count the bytes of bodies in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        self.paths: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        self.moved += int(request.headers.get("content-length", 0)) + int(response.headers.get("content-length", 0))
        self.paths.append(request.url.raw_path.decode())
        return response

    def during(self, call: Callable[[], object]) -> int:
        """Return the bytes that a call moves."""
        before = self.moved
        call()
        return self.moved - before
