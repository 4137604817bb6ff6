"""A small application behind the edge that sends back what it receives, and requests to it by hand."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgpack
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from farstep.errors import TensorMismatch
from farstep.protocol import encode
from farstep_service.routes import Edge, Pace
from farstep_service.routes.auth import AllowedHosts, Tokens
from farstep_service.routes.bodies import answer_message, read_body
from farstep_service.server.protocol import Protocol
from tests.support.service.answers import MSGPACK, TIMEOUT_S

LARGE = 1 << 24


class Echo:
    """Receives a message into memory of its own and sends it back; refuses one whose header says so.

    Attributes:
        answered: set when an answer has ended, whatever its end.
    """

    def __init__(self) -> None:
        self.answered = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        memory = bytearray()

        def place(header: dict[str, Any], size: int) -> list[memoryview]:
            if header.get("refuse"):
                raise TensorMismatch("It does not fit.")
            memory.extend(bytes(header["bytes"]))
            return [memoryview(memory)]

        body = await read_body(scope, receive, place, largest=LARGE, pace=Pace(0.2))
        try:
            times = body.header.get("times", 1)
            await answer_message(send, body.header, [memoryview(bytes(memory))] * times)
        finally:
            self.answered.set()


@contextmanager
def serving(
    app: ASGIApp, http: type[Protocol] = Protocol, tokens: Sequence[str] = ()
) -> Iterator[Callable[..., socket.socket]]:
    """Serve an application in a thread; yield what opens a connection to it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        edge = Edge(app, Tokens(tokens), AllowedHosts(allowed=["*"]))
        config = uvicorn.Config(edge, http=http, lifespan="off", log_config=None, ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        opened: list[socket.socket] = []

        def connect(received_bytes: int | None = None) -> socket.socket:
            sock = socket.socket()
            if received_bytes is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, received_bytes)
            sock.settimeout(TIMEOUT_S)
            sock.connect(listening.getsockname())
            opened.append(sock)
            return sock

        try:
            yield connect
        finally:
            for sock in opened:
                sock.close()
            server.should_exit = True
            thread.join()


def request(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """Return the bytes of one request."""
    body = b"".join(encode(header, [memoryview(payload)]))
    head = f"POST / HTTP/1.1\r\nhost: x\r\ncontent-type: {MSGPACK}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def echo(payload: bytes, **more: Any) -> bytes:
    """Return the bytes of a request that asks for its payload back."""
    return request({"bytes": len(payload), **more}, payload)


def read_one(sock: socket.socket, begun: bytes) -> tuple[bytes, bytes]:
    """Read one answer's payload and what came of the next one."""
    while b"\r\n\r\n" not in begun:
        begun += sock.recv(1 << 16)
    head, _, rest = begun.partition(b"\r\n\r\n")
    lines = dict(line.lower().split(b": ") for line in head.split(b"\r\n")[1:])
    size = int(lines[b"content-length"])
    while len(rest) < size:
        rest += sock.recv(1 << 16)
    unpacker = msgpack.Unpacker(max_buffer_size=1 << 24)
    unpacker.feed(rest[:size])
    return b"".join(list(unpacker)[1:]), rest[size:]
