"""Connections that are held in every state for as long as the server lets them, without a token, all at once.

Each way to hold one is a coroutine over a plain socket: it sends what keeps the state alive and returns when the server
has closed the connection. A connection that ends is opened again after a pause, until time is up. The attack runs in a
process of its own, and what it sends is bounded: by its pauses, and by `MOST_BYTES` for each connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

PAUSE_S = 0.5
"""Seconds between the end of a connection and the next one in its place."""
MOST_BYTES = 64 << 20
CREATE = "POST /v1/sessions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
PUSH = "POST /v1/sessions/good/push HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/msgpack\r\n"
HEALTH = "GET /healthz HTTP/1.1\r\nhost: {host}\r\n\r\n"


@dataclass
class Held:
    """What came of one way to hold connections.

    Attributes:
        opened: how many connections were made.
        refused: how many the server did not take.
        longest_s: the longest life of one, up to the end of the attack.
        sent_bytes: bytes that the server took, of all of them.
    """

    opened: int = 0
    refused: int = 0
    longest_s: float = 0.0
    sent_bytes: int = 0


class Line:
    """One connection: what it sends is counted, and what comes back is read and forgotten."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self._reader, self._writer = reader, writer
        self.host = host
        self.sent_bytes = 0

    async def send(self, data: bytes) -> None:
        """Send bytes; raise when the server has closed or has had enough."""
        if self.sent_bytes + len(data) > MOST_BYTES:
            raise ConnectionError
        self._writer.write(data)
        await self._writer.drain()
        self.sent_bytes += len(data)
        if self._reader.at_eof():
            raise ConnectionError

    async def ask(self, head: str) -> None:
        """Send a head, with the host filled in."""
        await self.send(head.format(host=self.host).encode())

    async def trickle(self, data: bytes, every_s: float) -> None:
        """Send the same bytes again and again."""
        while True:
            await self.send(data)
            await self.listen(every_s)

    async def listen(self, for_s: float | None = None) -> None:
        """Read what comes for so long, or until the server closes."""
        try:
            async with asyncio.timeout(for_s):
                while await self._reader.read(65536):
                    pass
        except TimeoutError:
            return
        raise ConnectionError

    async def close(self) -> None:
        """Drop the connection."""
        self._writer.transport.abort()


Way = Callable[[Line], Awaitable[None]]


async def silent(line: Line) -> None:
    """Say nothing."""
    await line.listen()


async def half_a_head(line: Line) -> None:
    """Begin a head and never end it."""
    await line.ask("GET /healthz HTTP/1.1\r\nhost: {host}\r\nx-slow: ")
    await line.trickle(b"a", 1.0)


async def empty_lines(line: Line) -> None:
    """Send empty lines where a request should begin."""
    await line.trickle(b"\r\n" * 64, 0.05)


async def a_refused_body(line: Line) -> None:
    """Let the body of a refused request trickle on."""
    await line.ask(CREATE + "content-length: 1000000\r\n\r\n")
    await line.trickle(b"x", 1.0)


async def a_body_that_never_comes(line: Line) -> None:
    """Announce a body, and leave it at that."""
    await line.ask(PUSH + "content-length: 100000\r\n\r\n")
    await line.listen()


async def a_body_that_is_awaited(line: Line) -> None:
    """Ask whether to go on, and do not."""
    await line.ask(CREATE + "content-length: 1000\r\nexpect: 100-continue\r\n\r\n")
    await line.listen()


async def trailers(line: Line) -> None:
    """Send trailers for ever."""
    await line.ask(CREATE + "transfer-encoding: chunked\r\n\r\n0\r\n")
    await line.trickle(b"a:\r\n" * 4096, 0.02)


async def one_trailer(line: Line) -> None:
    """Send one trailer that does not end."""
    await line.ask(CREATE + "transfer-encoding: chunked\r\n\r\n0\r\na:")
    await line.trickle(b"v" * 65536, 0.02)


async def chunk_extensions(line: Line) -> None:
    """Send an extension of a chunk that does not end."""
    await line.ask(CREATE + "transfer-encoding: chunked\r\n\r\n1;")
    await line.trickle(b"e" * 65536, 0.02)


async def small_chunks(line: Line) -> None:
    """Send a body in chunks of one byte."""
    await line.ask(CREATE + "transfer-encoding: chunked\r\n\r\n")
    await line.trickle(b"1\r\n{\r\n" * 512, 0.05)


async def pipelined(line: Line) -> None:
    """Send thousands of requests in one write."""
    for _ in range(4):
        await line.ask(HEALTH * 3500 + "GET /he")
        await line.listen(1.0)
    await line.listen()


async def unread_answers(line: Line) -> None:
    """Ask again and again, and read nothing."""
    while True:
        await line.ask("GET /docs HTTP/1.1\r\nhost: {host}\r\n\r\n" * 16)
        await asyncio.sleep(0.2)


async def idle(line: Line) -> None:
    """Ask once, and stay."""
    await line.ask(HEALTH)
    await line.listen()


async def upgrades(line: Line) -> None:
    """Ask for another protocol."""
    await line.ask("GET / HTTP/1.1\r\nhost: {host}\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n")
    await line.trickle(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 1.0)


async def strangers(line: Line) -> None:
    """Come under another name."""
    line.host = "attacker.example"
    await line.ask(HEALTH)
    await line.listen()


WAYS: Mapping[str, Way] = {
    way.__name__.replace("_", " "): way
    for way in (
        silent, half_a_head, empty_lines, a_refused_body, a_body_that_never_comes, a_body_that_is_awaited, trailers,
        one_trailer, chunk_extensions, small_chunks, pipelined, unread_answers, idle, upgrades, strangers,
    )
}  # fmt: skip


def hold(port: int, seconds: float, each: int) -> dict[str, Held]:
    """Hold connections in all ways for so long, and say what came of it.

    Args:
        port: the server's, on this machine.
        seconds: for how long.
        each: how many connections at once, of each way.
    """
    return asyncio.run(_hold(port, seconds, each))


async def _hold(port: int, seconds: float, each: int) -> dict[str, Held]:
    until = time.monotonic() + seconds
    results = {name: Held() for name in WAYS}
    async with asyncio.TaskGroup() as tasks:
        for name, way in WAYS.items():
            for _ in range(each):
                tasks.create_task(_repeat(port, way, results[name], until))
    return results


async def _repeat(port: int, way: Way, result: Held, until: float) -> None:
    while (left := until - time.monotonic()) > 0:
        began = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            result.refused += 1
            await asyncio.sleep(min(PAUSE_S, left))
            continue
        result.opened += 1
        line = Line(reader, writer, f"127.0.0.1:{port}")
        try:
            async with asyncio.timeout(left):
                await way(line)
        except (TimeoutError, OSError):
            pass
        finally:
            result.longest_s = max(result.longest_s, time.monotonic() - began)
            result.sent_bytes += line.sent_bytes
            await line.close()
        await asyncio.sleep(max(0.0, min(PAUSE_S, until - time.monotonic())))
