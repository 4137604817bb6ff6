"""What a server answers, and requests that are sent in part, over sockets of our own."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import msgpack

from farstep.errors import FarstepError, from_problem

MSGPACK = "application/msgpack"
PROBLEM = "application/problem+json"
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What came back: a message, a JSON document or a problem."""

    status: int
    kind: str
    body: bytes

    @property
    def document(self) -> Any:
        """Return the JSON document."""
        return json.loads(self.body)

    @property
    def objects(self) -> list[Any]:
        """Return the msgpack objects of a message."""
        unpacker = msgpack.Unpacker(max_buffer_size=len(self.body) + 1)
        unpacker.feed(self.body)
        return list(unpacker)

    @property
    def header(self) -> dict[str, Any]:
        """Return the header of a message."""
        assert self.status == 200, self.body[:1000]
        assert self.kind == MSGPACK
        first = self.objects[0]
        assert isinstance(first, dict)
        return first

    @property
    def payload(self) -> bytes:
        """Return the payload of a message."""
        return b"".join(self.objects[1:])

    @property
    def receipt(self) -> dict[str, Any]:
        """Return the receipt of a write."""
        found = self.header["receipt"]
        assert isinstance(found, dict)
        return found

    @property
    def error(self) -> FarstepError:
        """Return the error that a problem document stands for, having checked that it is one and gives nothing away."""
        assert self.kind == PROBLEM, (self.status, self.kind, self.body[:1000])
        text = self.body.decode()
        assert len(text) < 4000, text
        assert not any(word in text for word in ("Traceback", 'File "', ".py", "0x7f")), text
        problem = self.document
        assert problem["status"] == self.status
        assert problem["type"] == f"urn:farstep:error:{problem['code']}"
        assert problem["title"]
        assert problem["detail"]
        return from_problem(problem, self.status)

    @property
    def code(self) -> str:
        """Return the code of a problem."""
        _ = self.error
        return str(self.document["code"])


@contextmanager
def half_sent(
    url: str, method: str, path: str, headers: Mapping[str, str], body: Sequence[bytes | memoryview] = ()
) -> Iterator[socket.socket]:
    """Send the head of a request and some of its body, and leave the rest to the caller."""
    with opened(url) as sock:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {httpx.URL(url).netloc.decode()}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        for each in body:
            sock.sendall(each)
        yield sock


@contextmanager
def opened(url: str, *, buffer_bytes: int | None = None) -> Iterator[socket.socket]:
    """Connect to a server.

    Args:
        url: where it is.
        buffer_bytes: how much the system may receive ahead of us; little of it lets a server feel that we are slow.
    """
    where = httpx.URL(url)
    with socket.socket() as sock:
        sock.settimeout(TIMEOUT_S)
        if buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        sock.connect((where.host, where.port or 80))
        yield sock


def read_answer(sock: socket.socket, begun: bytes = b"") -> Answer:
    """Read one answer from a connection, of which some may have been read."""
    status, headers, body = _read_head(sock, begun)
    missing = int(headers.get("content-length", 0)) - len(body)
    pieces = [body]
    while missing > 0:
        chunk = sock.recv(min(missing, 1 << 20))
        assert chunk, "the answer was cut off"
        pieces.append(chunk)
        missing -= len(chunk)
    return Answer(status, headers.get("content-type", ""), b"".join(pieces))


def read_head(sock: socket.socket) -> tuple[int, int]:
    """Read the head of an answer; return its status and how many bytes of its body are to come."""
    status, headers, body = _read_head(sock, b"")
    return status, int(headers.get("content-length", 0)) - len(body)


def _read_head(sock: socket.socket, received: bytes) -> tuple[int, dict[str, str], bytes]:
    """Read a head and no byte behind it: what follows may be the answer to another request."""
    while b"\r\n\r\n" not in received:
        seen = sock.recv(65536, socket.MSG_PEEK)
        assert seen, f"the connection was closed after {received!r}"
        end = (received + seen).find(b"\r\n\r\n")
        received += sock.recv(len(seen) if end < 0 else end + 4 - len(received))
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status.split()[1]), headers, body
