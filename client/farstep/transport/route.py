"""A request that is made again and again: what stays the same of it is prepared once.

httpx builds a request, with headers and URL, in 30 us, and a response in as many: as long as all the rest of a small
step takes on this side. Over a `Route` neither is built, unless the answer is an error, which httpx's objects tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import httpx

from farstep.transport.body import Readable, ResponseBody, body_of
from farstep.transport.connection import Timeouts
from farstep.transport.head import BODY, DEADLINE_S, IDEMPOTENT, NAMED, ResponseHead, request_head
from farstep.transport.pool import Origin, origin_of

HEADS_KEPT = 32
"""Lengths of bodies whose head is remembered."""


@final
class Route:
    """Say where requests go, and how.

    Args:
        request: one of them; method, URL, headers and time timeouts are those of all.

    Attributes:
        request: the same without its body, whose memory is not ours to keep; errors name it.
        origin: what it goes to.
        timeouts: how long an exchange may take.
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
        self.timeouts = Timeouts.of(request.extensions)
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


class Described(NamedTuple):
    """What a head says of the body behind it: type, coding, length, and whether the head says where it ends.

    Attributes:
        kind: the `Content-Type`, empty if there is none.
        coding: the `Content-Encoding`, empty if it is sent as it is.
        length: its bytes, None where the head does not say.
        framed: its end can be told from that of the connection.
    """

    kind: bytes
    coding: bytes
    length: int | None
    framed: bool

    @classmethod
    def by(cls, head: ResponseHead) -> Described:
        """Return what a head says."""
        return cls(head.kind, head.coding, head.length, head.chunked or head.length is not None)


@final
class Answer:
    """An answer whose head is there.

    Args:
        status: its status code.
        body: what follows.
        close: gives the connection up, if the body was not read to its end.
        head: what its head says of the body.
        response: makes httpx's form of it.
    """

    def __init__(
        self,
        status: int,
        body: Readable,
        close: Callable[[], None],
        head: Described,
        response: Callable[[], httpx.Response],
    ) -> None:
        self.status = status
        self.body = body
        self.close = close
        self.head = head
        self.response = response

    @classmethod
    def of(cls, response: httpx.Response) -> Answer:
        """Return the answer that httpx's response is."""
        told = response.headers
        length, coding = told.get("content-length", ""), told.get("content-encoding", "")
        head = Described(
            kind=told.get("content-type", "").encode(),
            coding=b"" if coding.lower() == "identity" else coding.encode(),
            length=int(length) if length.isascii() and length.isdigit() else None,
            framed=bool(length) or "transfer-encoding" in told,
        )
        return cls(response.status_code, body_of(response), response.close, head, lambda: response)

    @property
    def ok(self) -> bool:
        """Return whether the request was granted."""
        return 200 <= self.status < 300


def response_of(head: ResponseHead, body: ResponseBody, request: httpx.Request) -> httpx.Response:
    """Return httpx's form of an answer."""
    return httpx.Response(
        head.status,
        headers=head.headers,
        stream=body,
        request=request,
        extensions={"http_version": head.version, "reason_phrase": head.reason, BODY: body},
    )
