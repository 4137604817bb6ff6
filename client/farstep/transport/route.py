"""A request that is made again and again: what stays the same of it is prepared once.

httpx builds a request, with headers and URL, in 30 us, and a response in as many: as long as all the rest of a small
step takes on this side. Over a `Route` neither is built, unless the answer is an error, which httpx's objects tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import httpx

from .body import Readable, ResponseBody, body_of
from .connection import Limits
from .extensions import BODY, DEADLINE_S, NAMED
from .head import IDEMPOTENT, ResponseHead, request_head
from .pool import Origin, origin_of

HEADS_KEPT = 32
"""Lengths of bodies whose head is remembered."""


@final
class Route:
    """Say where requests go, and how.

    Args:
        request: one of them; method, URL, headers and time limits are those of all.

    Attributes:
        request: the same without its body, whose memory is not ours to keep; errors name it.
        origin: what it goes to.
        limits: how long an exchange may take.
        repeatable: sending it twice changes nothing more than once.

    Raises:
        ValueError: the request has a deadline of its own, which cannot be that of others.
    """

    def __init__(self, request: httpx.Request) -> None:
        if DEADLINE_S in request.extensions:
            raise ValueError(f"Invalid extension {DEADLINE_S} of a route: each request has a deadline of its own.")
        self.request = httpx.Request(
            request.method, request.url, headers=request.headers, extensions=request.extensions
        )
        self.origin: Origin = origin_of(request)
        self.limits = Limits.of(request.extensions)
        self.repeatable = request.method in IDEMPOTENT or bool(request.extensions.get(NAMED))
        self._heads: dict[int, memoryview] = {}

    def head(self, body_bytes: int) -> memoryview:
        """Return the head of a request with so long a body."""
        head = self._heads.get(body_bytes)
        if head is None:
            if len(self._heads) == HEADS_KEPT:
                self._heads.clear()
            head = self._heads[body_bytes] = memoryview(request_head(self.request, body_bytes))
        return head


@final
class Answer:
    """An answer whose head is there.

    Args:
        status: its status code.
        body: what follows.
        close: gives the connection up, if the body was not read to its end.
        response: makes httpx's form of it.
    """

    def __init__(
        self, status: int, body: Readable, close: Callable[[], None], response: Callable[[], httpx.Response]
    ) -> None:
        self.status = status
        self.body = body
        self.close = close
        self._response = response

    @classmethod
    def of(cls, response: httpx.Response) -> Answer:
        """Return the answer that httpx's response is."""
        return cls(response.status_code, body_of(response), response.close, lambda: response)

    @property
    def ok(self) -> bool:
        """Say whether the request was granted."""
        return 200 <= self.status < 300

    def response(self) -> httpx.Response:
        """Return httpx's form of it, read to the end.

        Raises:
            httpx.TransportError: the end did not come.
        """
        response = self._response()
        response.read()
        return response


def response_of(head: ResponseHead, body: ResponseBody, request: httpx.Request) -> httpx.Response:
    """Return httpx's form of an answer."""
    return httpx.Response(
        head.status,
        headers=head.headers,
        stream=body,
        request=request,
        extensions={"http_version": head.version, "reason_phrase": head.reason, BODY: body},
    )
