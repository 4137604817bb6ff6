"""Whole sessions as files: export from a server, and import into one.

    GET  /v1/sessions/{name}/file     one version of the session as a safetensors file (`docs/sessions.md`)
    PUT  /v1/sessions/{name}/file     such a file becomes the session of that name, which must be free

A file is checked before memory is allocated for its tensors, and the session appears when it is complete: an earlier
error leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import final

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from farstep.errors import InvalidRequest, Truncated
from farstep.identity import NAME
from farstep.protocol.tensor_file import LENGTH_BYTES, head_length, read_head
from farstep_service.durability import file_of, places_of
from farstep_service.routes.bodies import Pace, answer_pieces, chunks, declared, outgoing_of
from farstep_service.routes.documents import snapshot_of
from farstep_service.sessions import Actor
from farstep_service.sessions.registry import Registry
from farstep_service.settings import Settings

FILE = b"application/octet-stream"
LARGEST = 2**63
"""The largest file; the real bound follows from its head, which is read before memory is allocated."""


@final
class SessionFileEndpoint:
    """Send and receive sessions as files."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["name"]
        if scope["method"] != "PUT":
            await self._give(self._registry.find(name), scope, send)
            return
        actor, version = await self._take(name, scope, receive)
        answer = json.dumps({"name": actor.name, "incarnation": actor.incarnation, "version": version})
        await answer_pieces(send, b"application/json", [answer.encode()], status=201)

    async def _give(self, actor: Actor, scope: Scope, send: Send) -> None:
        plan = actor.plan
        with self._registry.in_flight() as reserve:
            size = plan.layout.nbytes * (1 + len(plan.rule.tensor_fields))
            reserve(size)
            async with actor.reads.copying(size, outgoing_of(scope)):
                snapshot = await actor.reads.snapshot()
                pieces = await asyncio.to_thread(file_of, snapshot)
                disposition = f'attachment; filename="{actor.name}.safetensors"'.encode()
                await answer_pieces(send, FILE, pieces, headers=[(b"content-disposition", disposition)])

    async def _take(self, name: str, scope: Scope, receive: Receive) -> tuple[Actor, int]:
        if not NAME.fullmatch(name):
            raise InvalidRequest(f"No session can be called {name!r:.80}.", field="name")
        size = declared(scope, FILE, LARGEST)
        with self._registry.in_flight() as reserve:
            incoming = Incoming(chunks(receive, size, Pace(self._settings.idle_body_s)))
            first = bytearray(LENGTH_BYTES if size is None else min(LENGTH_BYTES, size))
            await incoming.fill([memoryview(first)])
            length = head_length(bytes(first), LARGEST if size is None else size)
            reserve(length)
            text = bytearray(length)
            await incoming.fill([memoryview(text)])

            # In threads: reading a head of 100,000 parameters takes a while.
            behind = None if size is None else size - LENGTH_BYTES - length
            head = await asyncio.to_thread(read_head, text, behind)
            snapshot = await asyncio.to_thread(snapshot_of, head, name)
            self._registry.check_free(snapshot.plan)
            reserve(snapshot.contents.nbytes)
            await incoming.fill(await asyncio.to_thread(places_of, head, snapshot.contents))
            await incoming.end()
            actor = await self._registry.restore(snapshot)
            return actor, snapshot.version


@final
class Incoming:
    """Read a body in chunks into given memory."""

    def __init__(self, body: AsyncIterator[bytes]) -> None:
        self._body = body
        self._rest = memoryview(b"")

    async def fill(self, places: Sequence[memoryview]) -> None:
        """Fill the given memory.

        Raises:
            Truncated: the body ends before.
        """
        for place in places:
            while len(place):
                if not len(self._rest):
                    self._rest = memoryview(await self._next())
                count = min(len(place), len(self._rest))
                place[:count] = self._rest[:count]
                place, self._rest = place[count:], self._rest[count:]

    async def end(self) -> None:
        """Refuse anything that follows."""
        rest = len(self._rest) + sum([len(chunk) async for chunk in self._body])
        if rest:
            raise InvalidRequest(f"{rest} bytes follow the end of the file.")

    async def _next(self) -> bytes:
        try:
            return await anext(self._body)
        except StopAsyncIteration:
            raise Truncated("The body ended before the file was complete.") from None


def session_file_routes(registry: Registry, settings: Settings) -> list[Route]:
    """Return the routes of session files."""
    return [Route("/v1/sessions/{name}/file", SessionFileEndpoint(registry, settings), methods=["GET", "PUT"])]
