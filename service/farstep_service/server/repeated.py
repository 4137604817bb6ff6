"""Heads that a connection repeats: a worker's pushes have heads that are alike to the byte, step after step.

Such a head is parsed once. A later request that begins with the same bytes, at the same place, and ends with its body,
means the same: what the parser made of the first one is taken over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self, cast, final

from uvicorn._types import HTTPScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from farstep_service.server.framing import END

LENGTH = b"content-length"
KEPT = (b"connection", b"keep-alive")
OWN = frozenset({"state", "extensions", "path_params"})
"""What each request has of its own in its scope."""
PLAIN = frozenset({b"host", b"user-agent", b"accept", b"accept-encoding", b"authorization", b"content-type"})
"""Headers that say nothing about the connection, or where a body ends."""


@final
class RequestHead:
    """A head that may come again.

    Attributes:
        raw: its bytes.
        body_bytes: the length of the body that it announces.
    """

    def __init__(self, raw: bytes, body_bytes: int, scope: dict[str, Any]) -> None:
        self.raw = raw
        self.body_bytes = body_bytes
        self._scope = scope

    @classmethod
    def of(cls, data: bytes, scope: dict[str, Any]) -> Self | None:
        """Return the head of a request, None for one that says more than where to, what and how long.

        Args:
            data: the request, and nothing else.
            scope: what the parser made of it.
        """
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        lengths = [value for name, value in headers if name == LENGTH]
        others = {name for name, value in headers if name != LENGTH and (name, value) != KEPT}
        if len(lengths) != 1 or not lengths[0].isdigit() or not others <= PLAIN or scope["http_version"] != "1.1":
            return None
        kept = {key: value for key, value in scope.items() if key not in OWN}
        head = cls(data[: data.index(END) + len(END)], int(lengths[0]), kept)
        return head if head.begins(data) else None

    def begins(self, data: bytes) -> bool:
        """Return whether `data` is this head with its body, and nothing else."""
        return len(data) == len(self.raw) + self.body_bytes and data.startswith(self.raw)

    def scope(self) -> dict[str, Any]:
        """Return what the parser would make of it."""
        return {**self._scope, "headers": list(self._scope["headers"])}

    def cycle(
        self, owner: HttpToolsProtocol, scope: dict[str, Any], on_response: Callable[[], None]
    ) -> RequestResponseCycle:
        """Return the request and its answer as uvicorn would make them when it has parsed this head.

        Args:
            owner: the connection.
            scope: what `scope` has returned.
            on_response: called when it is answered.
        """
        return RequestResponseCycle(
            scope=cast(HTTPScope, scope),
            transport=owner.transport,
            flow=owner.flow,
            logger=owner.logger,
            access_logger=owner.access_logger,
            access_log=owner.access_log,
            default_headers=owner.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=True,
            on_response=on_response,
        )
