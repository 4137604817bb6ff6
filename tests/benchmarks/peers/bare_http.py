"""HTTP and nothing else: N bytes there and N bytes back between farstep's client transport and an empty server.

The server is uvicorn with uvloop and httptools and an ASGI function that puts the request's body into one block of
memory and answers with another. The client is httpx over `farstep.transport.SocketTransport`, or httpx as it comes.
What lies between this and a farstep step is the service's doing; what lies between this and bare sockets is HTTP's.

uvicorn makes a `bytes` of every 256 KiB it receives. As glibc comes, each of them goes back to the kernel and the next
is paid for in page faults: 100 MB each way then take two to three times as long. `MALLOC_TOP_PAD_` keeps the memory.

    python -m tests.benchmarks.peers.bare_http
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from statistics import median
from typing import Any, Literal

import httpx

PATIENCE_S = 60.0
SIZES = (10_000, 1_000_000, 100_000_000)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Client = Literal["farstep", "httpx"]


def measure(sizes: Sequence[int], rounds: int, *, client: Client = "farstep") -> list[float]:
    """Return the median seconds of a POST whose answer is as long as its body, for each size.

    Args:
        sizes: bytes there, and as many back.
        rounds: timed requests of each size; two more go before them.
        client: `farstep` for our transport, `httpx` for its own.
    """
    return [median(each) for each in measure_all(sizes, rounds, client=client)]


def measure_all(sizes: Sequence[int], rounds: int, *, client: Client = "farstep") -> list[list[float]]:
    """Return the seconds of every timed request, a list for each size."""
    ask = _ask_farstep if client == "farstep" else _ask_httpx
    with server() as url:
        return [list(ask(url, size, rounds))[2:] for size in sizes]


def _ask_farstep(url: str, size: int, rounds: int) -> Iterator[float]:
    from farstep.transport import BufferedBody, SocketTransport, body_of

    outgoing, incoming = memoryview(bytearray(b"\x5a" * size)), memoryview(bytearray(size))
    with httpx.Client(base_url=url, transport=SocketTransport(), timeout=PATIENCE_S) as client:
        for _ in range(rounds + 2):
            began = time.perf_counter()
            response = client.send(BufferedBody([outgoing]).request(client, "POST", "/"), stream=True)
            body, got = body_of(response), 0
            while count := body.readinto(incoming[got:]):
                got += count
            response.close()
            yield time.perf_counter() - began
            assert got == size


def _ask_httpx(url: str, size: int, rounds: int) -> Iterator[float]:
    outgoing = b"\x5a" * size
    with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
        for _ in range(rounds + 2):
            began = time.perf_counter()
            response = client.post("/", content=outgoing)
            yield time.perf_counter() - began
            assert len(response.content) == size


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Run the empty server in a process of its own and give its URL."""
    command = [sys.executable, __file__, "--serve"]
    surroundings = {"MALLOC_TOP_PAD_": str(64 << 20), **os.environ}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Take a body into memory and answer with as many bytes from memory."""
    size = next(int(value) for name, value in scope["headers"] if name == b"content-length")
    incoming, outgoing = _memory(size)
    got = 0
    while True:
        message = await receive()
        body = message.get("body", b"")
        incoming[got : got + len(body)] = body
        got += len(body)
        if not message.get("more_body"):
            break
    headers = [(b"content-type", b"application/msgpack"), (b"content-length", b"%d" % size)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": outgoing})


_blocks: dict[int, tuple[memoryview, memoryview]] = {}


def _memory(size: int) -> tuple[memoryview, memoryview]:
    if size not in _blocks:
        _blocks[size] = memoryview(bytearray(size)), memoryview(bytearray(b"\xa5" * size))
    return _blocks[size]


def _serve() -> None:
    import uvicorn
    import uvloop

    config = uvicorn.Config(
        application, port=0, loop="uvloop", http="httptools", ws="none", lifespan="off", access_log=False,
        log_level="error", timeout_keep_alive=int(PATIENCE_S), date_header=False, server_header=False,
    )  # fmt: skip
    running = uvicorn.Server(config)

    async def serve() -> None:
        announced = asyncio.create_task(announce())
        await running.serve()
        await announced

    async def announce() -> None:
        while not running.started:
            await asyncio.sleep(0.01)
        print(running.servers[0].sockets[0].getsockname()[1], flush=True)

    uvloop.run(serve())


def main() -> None:
    """Print each size's figures, one kind after the other three times so that a busy moment hits all of them."""
    if sys.argv[1:] == ["--serve"]:
        return _serve()
    from tests.benchmarks.peers import raw_sockets

    kinds: dict[str, Callable[[], list[float]]] = {
        "raw sockets": lambda: raw_sockets.measure(SIZES, 15),
        "farstep's transport": lambda: measure(SIZES, 15),
        "httpx as it comes": lambda: measure(SIZES, 5, client="httpx"),
    }
    runs = [{kind: run() for kind, run in kinds.items()} for _ in range(3)]
    for place, size in enumerate(SIZES):
        limit = median(run["raw sockets"][place] for run in runs)
        for kind in kinds:
            seconds = median(run[kind][place] for run in runs)
            print(f"{size:>12,} bytes there and back  {kind:<20} {seconds * 1e3:9.3f} ms  {seconds / limit:6.2f} x")


if __name__ == "__main__":
    main()
