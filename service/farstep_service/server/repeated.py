"""Repeated heads: a worker's pushes have byte-identical heads, step after step.

Such a head is parsed once. For a later request that consists of the same head and its body, the parser's first result
is reused.
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
"""Entries of the scope that each request has for itself."""
PLAIN = frozenset({b"host", b"user-agent", b"accept", b"accept-encoding", b"authorization", b"content-type"})
"""Headers that affect neither the connection nor the framing."""


@final
class RequestHead:
    """A head that may be repeated.

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
        """Return the head of a request, None for one with other headers than usual.

        Args:
            data: the request, and nothing else.
            scope: the parser's result.
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
        """Return whether `data` is exactly this head with its body."""
        return len(data) == len(self.raw) + self.body_bytes and data.startswith(self.raw)

    def scope(self) -> dict[str, Any]:
        """Return the scope that the parser would make."""
        return {**self._scope, "headers": list(self._scope["headers"])}

    def cycle(
        self, owner: HttpToolsProtocol, scope: dict[str, Any], on_response: Callable[[], None]
    ) -> RequestResponseCycle:
        """Return the request cycle that uvicorn would make after parsing this head.

        Args:
            owner: the connection.
            scope: the result of `scope`.
            on_response: called after the answer.
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
