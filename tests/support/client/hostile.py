"""A server that lies: it stands in front of a real one and gives one kind of request another answer, over real sockets.

    with hostile(server.port) as liar:
        optimizer = Adagrad(..., server=liar.url)
        liar.answer("POST", "/push", lie)          # until `liar.honest()`
        optimizer.step()

A lie is bytes, or a function that writes to the connection as it likes, or one that changes the true answer, which the
server has then given.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgpack

PATIENCE_S = 30.0
MEGABYTE = 1 << 20

Write = Callable[[socket.socket, threading.Event], None]
Change = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Answer:
    """One true answer: status line, headers, body."""

    status: str
    headers: dict[str, str]
    body: bytes

    @property
    def raw(self) -> bytes:
        told = {**self.headers, "content-length": str(len(self.body))}
        return (self.status + "\r\n" + "".join(f"{k}: {v}\r\n" for k, v in told.items()) + "\r\n").encode() + self.body


class Liar:
    """The server in front; see the module.

    Attributes:
        asked: the requests it has seen, as `METHOD path`.
        heads: the same, whole.
        told: how often it has lied.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._over = threading.Event()
        self._lie: tuple[str, str, bytes | Write | None, Change | None] | None = None
        self.asked: list[str] = []
        self.heads: list[str] = []
        self.told = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def answer(self, method: str, path: str, lie: bytes | Write) -> None:
        """Give requests whose path ends so, but for the query, this answer; the server never sees them."""
        self._lie = (method, path, lie, None)

    def change(self, method: str, path: str, change: Change) -> None:
        """Change the header or document of the server's answer to such requests."""
        self._lie = (method, path, None, change)

    def honest(self) -> None:
        """Lie no more."""
        self._lie = None

    def close(self) -> None:
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE_S)

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with suppress(OSError), sock, sock.makefile("rb") as incoming:
            sock.settimeout(PATIENCE_S)
            while head := b"".join(lines_of(incoming)):
                length = re.search(rb"(?i)content-length: (\d+)", head)
                body = incoming.read(int(length[1])) if length else b""
                method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
                self.asked.append(f"{method} {target}")
                self.heads.append(head.decode())
                lie = self._lie
                if lie is None or lie[0] != method or not target.partition("?")[0].endswith(lie[1]):
                    sock.sendall(self._truth(head, body).raw)
                    continue
                self.told += 1
                if lie[3] is not None:
                    sock.sendall(changed(self._truth(head, body), lie[3]).raw)
                elif isinstance(lie[2], bytes):
                    sock.sendall(lie[2])
                    return
                elif lie[2] is not None:
                    lie[2](sock, self._over)
                    return

    def _truth(self, head: bytes, body: bytes) -> Answer:
        with socket.create_connection(("127.0.0.1", self._port), PATIENCE_S) as there, there.makefile("rb") as back:
            there.sendall(head + b"\r\n" + body)
            status, *lines = [line.decode().strip() for line in lines_of(back)]
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            return Answer(status, headers, back.read(int(headers.get("content-length", 0))))


@contextmanager
def hostile(port: int) -> Iterator[Liar]:
    """Put a liar in front of a server on this machine, until the end of the block."""
    liar = Liar(port)
    try:
        yield liar
    finally:
        liar.close()


def lines_of(incoming: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a head, up to the empty one or the end of the connection."""
    while (line := incoming.readline()) not in (b"\r\n", b""):
        yield line


def changed(answer: Answer, change: Change) -> Answer:
    """Return an answer whose document, or header of a message, is changed."""
    if answer.headers.get("content-type") == "application/json":
        document = json.loads(answer.body)
        change(document)
        return Answer(answer.status, answer.headers, json.dumps(document).encode())
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(answer.body)
    header = unpacker.unpack()
    change(header)
    return Answer(answer.status, answer.headers, msgpack.packb(header) + answer.body[unpacker.tell() :])


# -- lies ------------------------------------------------------------------------------------------------------------


def http(body: bytes, *, status: str = "200 OK", kind: str = "", extra: str = "") -> bytes:
    """Return a well-formed answer."""
    told = f"Content-Type: {kind}\r\n" if kind else ""
    return f"HTTP/1.1 {status}\r\n{told}Content-Length: {len(body)}\r\n{extra}\r\n".encode() + body


def head(kind: str, *lines: str) -> bytes:
    """Return the head of an answer, whatever its lines say."""
    return "\r\n".join(("HTTP/1.1 200 OK", f"Content-Type: {kind}", *lines, "", "")).encode()


def endless(first: bytes, again: bytes, *, most: int = 64 * MEGABYTE) -> Write:
    """Return a lie that goes on until the client hangs up; it ends after more bytes than any client takes."""

    def write(sock: socket.socket, over: threading.Event) -> None:
        piece = again * max(1, 65536 // len(again))
        sock.sendall(first)
        for _ in range(most // len(piece)):
            sock.sendall(piece)

    return write


def trickling(first: bytes, again: bytes) -> Write:
    """Return a lie of which a little comes every 20 ms, until the client hangs up."""

    def write(sock: socket.socket, over: threading.Event) -> None:
        sock.sendall(first)
        while not over.wait(0.02):
            sock.sendall(again)

    return write


def silent(sock: socket.socket, over: threading.Event) -> None:
    """Say nothing, and keep the connection."""
    sock.recv(1)


def bomb(kind: str) -> bytes:
    """Return 48 MB of zeros in 48 kB of gzip."""
    return http(gzip.compress(bytes(48 * MEGABYTE)), kind=kind, extra="Content-Encoding: gzip\r\n")


def deep(levels: int = 200_000) -> bytes:
    """Return JSON that is nested deep."""
    return b"[" * levels + b"]" * levels


PICKLED = bytes.fromhex("8004951f000000000000007d94288c0176944b018c066669656c6473945d948c05706172616d9461752e")
"""A pickle of a header, which no client may load."""
