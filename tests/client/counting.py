"""A transport that counts what it carries."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from farstep.transport import SocketTransport


class Counting(httpx.BaseTransport):
    """Carry requests and count the bytes of bodies in both directions."""

    def __init__(self) -> None:
        self._inner = SocketTransport()
        self.moved = 0
        self.paths: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._inner.handle_request(request)
        self.moved += int(request.headers.get("content-length", 0)) + int(response.headers.get("content-length", 0))
        self.paths.append(request.url.raw_path.decode())
        return response

    def close(self) -> None:
        self._inner.close()

    def during(self, call: Callable[[], object]) -> int:
        """Return the bytes that a call moves."""
        before = self.moved
        call()
        return self.moved - before
