"""The answer to one request on its way out: its head goes into the same write as the first of its body.

Between two writes the client wakes up for the head alone, and sleeps again. ASGI asks for this order too: a server
begins to answer when there is a body to send.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import final

from starlette.types import ASGIApp, Message, Receive, Scope, Send


@final
class Answering:
    """Stand around the application, and between what uvicorn writes for it and the connection.

    Args:
        app: answers the request.
        transport: the connection.
    """

    def __init__(self, app: ASGIApp, transport: asyncio.Transport) -> None:
        self._app = app
        self._transport = transport
        self._start: Message | None = None
        self._held: list[bytes] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, partial(self._send, send))

    async def _send(self, send: Send, message: Message) -> None:
        if message["type"] == "http.response.start" and self._start is None:
            self._start = message
            return
        start, self._start = self._start, None
        if start is None:
            await send(message)
            return
        self._held = []
        try:
            await send(start)
            await send(message)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held:
            self._transport.writelines(held)

    # -- what uvicorn's cycle asks of a transport ---------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write, or keep for the write that follows."""
        if self._held is None:
            self._transport.write(data)
        else:
            self._held.append(data)

    def close(self) -> None:
        """Write what is kept and close."""
        self._let_go()
        self._transport.close()

    def is_closing(self) -> bool:
        """Say whether the connection is being closed."""
        return self._transport.is_closing()
