"""The limits of each state of a connection: bytes, requests, time, and the least rate.

A connection is in one state at a time. Each state has a row here, `farstep_service.server.protocol` enforces it, and
docs/limits.md shows the same rows to users; a test compares the two.

A state that a client without a token can reach costs little: kilobytes and seconds. With a token, a body is as large as
its session, and only its rate distinguishes a slow client from one that never ends.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf

KIB = 2**10
MIB = 2**20
UNBOUNDED = sys.maxsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The limits of one state of a connection; a default means that something else is the bound.

    Attributes:
        state: a description of the state.
        token: whether this state needs a token; a server without tokens asks for none.
        most_bytes: bytes received in this state.
        most: the largest number of `things`.
        things: the counted things.
        within_s: seconds in this state in total.
        silent_s: seconds without a byte.
        least_bytes_per_s: rate overall, once `silent_s` has passed.
        beyond: what happens to a connection that exceeds a limit.
    """

    state: str
    token: bool = False
    most_bytes: int = UNBOUNDED
    most: int = UNBOUNDED
    things: str = ""
    within_s: float = inf
    silent_s: float = inf
    least_bytes_per_s: float = 0.0
    beyond: str

    def __post_init__(self) -> None:
        for name in ("most_bytes", "most", "within_s", "silent_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Invalid {name}={getattr(self, name)}. Must be above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """The table: the limits of each state of a connection, in the order in which a request passes them."""

    waiting: Limit = Limit(
        state="connected, nothing sent yet",
        within_s=10.0,
        beyond="closed without a word",
    )
    crowd: Limit = Limit(
        state="connected, when the server has hardly a file descriptor left",
        most=32,
        things="descriptors are kept free",
        beyond="the one that has waited longest is closed, those without a token first; 503 `busy` if none waits",
    )
    blank: Limit = Limit(
        state="sending empty lines before a request",
        most_bytes=64,
        beyond="400 `invalid_request`; closed",
    )
    head: Limit = Limit(
        state="sending the head of a request",
        most_bytes=32 * KIB,
        most=100,
        things="headers",
        within_s=10.0,
        beyond="408, or 431 `limit_exceeded`; closed",
    )
    early: Limit = Limit(
        state="requests sent before the answer to the one ahead",
        most=1,
        things="begun in a turn",
        beyond="not read on; each waits for its turn",
    )
    body: Limit = Limit(
        state="sending a body",
        token=True,
        silent_s=30.0,
        least_bytes_per_s=16 * KIB,
        beyond="400 `truncated`; closed if nothing more comes",
    )
    chunk: Limit = Limit(
        state="sending the line before a chunk",
        token=True,
        most_bytes=256,
        most=4096,
        things="chunks, and one more for each 64 bytes of content",
        beyond="413 `limit_exceeded`; closed",
    )
    trailers: Limit = Limit(
        state="sending trailers behind the last chunk, which are dropped",
        token=True,
        most_bytes=4 * KIB,
        most=16,
        things="trailers",
        beyond="413 `limit_exceeded`; closed",
    )
    refused: Limit = Limit(
        state="sending the body of a request that was refused for its token",
        most_bytes=1 * MIB,
        within_s=5.0,
        beyond="not read on; closed",
    )
    dropped: Limit = Limit(
        state="sending the body of a request that was answered before its end",
        token=True,
        within_s=60.0,
        beyond="closed",
    )
    reading: Limit = Limit(
        state="reading an answer",
        silent_s=60.0,
        least_bytes_per_s=16 * KIB,
        beyond="cut off",
    )
    idle: Limit = Limit(
        state="between two requests",
        within_s=120.0,  # longer than clients keep theirs (60 s), so that no push uses a closed one
        beyond="closed without a word",
    )

    def rows(self) -> Mapping[str, Limit]:
        """Return every limit by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentLimits:
    """The largest incoming JSON documents, by route.

    Attributes:
        other_bytes: for routes that are not named.
        by_route: bytes by method and path, such as `POST /v1/sessions`.
    """

    other_bytes: int
    by_route: Mapping[str, int]

    def most_bytes(self, method: str, path: str) -> int:
        """Return the largest size of a document.

        Args:
            path: the route's path with its parameters in braces, such as `/v1/sessions/{name}/groups`.
        """
        return self.by_route.get(f"{method} {path}", self.other_bytes)


CONNECTION = ConnectionLimits()
DOCUMENTS = DocumentLimits(
    other_bytes=64 * KIB,
    by_route={
        "POST /v1/sessions": 32 * MIB,  # 100,000 parameters with long names
        "PATCH /v1/sessions/{name}/groups": 4 * MIB,  # 10,000 param groups
    },
)
"""Documents of the routes that are named here are read in pieces (`farstep_service.routes.pieces`)."""
