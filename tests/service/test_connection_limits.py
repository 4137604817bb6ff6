"""Every state of a connection has a deadline and a budget: each row of the table, over a socket."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
from starlette.types import Receive, Scope, Send

from farstep.errors import UnsupportedMedia
from farstep_service.limits import CONNECTION, ConnectionLimits
from farstep_service.server.protocol import Protocol
from tests.support.service.answers import MSGPACK, PROBLEM, TIMEOUT_S, read_answer
from tests.support.service.echoing import Echo, echo, read_one, request, serving
from tests.support.service.raw import RawClient
from tests.support.service.servers import TOKEN, running_server

SOON_S = 0.1
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
SHOWN = f"authorization: Bearer {TOKEN}\r\n".encode()


class Hasty(Protocol):
    """A connection that is held to the same table, but for the seconds."""

    limits = ConnectionLimits(
        **{
            name: replace(limit, within_s=min(limit.within_s, SOON_S), silent_s=min(limit.silent_s, SOON_S))
            for name, limit in CONNECTION.rows().items()
        }
    )


class Pieces:
    """An application that takes a body in pieces, as ASGI has it, and answers with its length.

    Attributes:
        headers: those of the last request.
    """

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/unread":
            raise UnsupportedMedia("Not this.")
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message["more_body"]
        self.headers = list(scope["headers"])
        body = str(size).encode()
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


Connect = Callable[..., socket.socket]


@contextmanager
def sent(connect: Connect, *pieces: bytes) -> Iterator[socket.socket]:
    with connect() as sock:
        for piece in pieces:
            sock.sendall(piece)
        yield sock


def is_closed(sock: socket.socket) -> bool:
    """Return whether the other side ends the connection, with whatever it still has to say before that."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def refused(connect: Connect, status: int, code: str, *pieces: bytes) -> None:
    """Check that what is sent is answered by a problem document of this code, and that this ends the connection."""
    with sent(connect, *pieces) as sock:
        answer = read_answer(sock)
        assert (answer.status, answer.code, answer.kind) == (status, code, PROBLEM)
        assert is_closed(sock)


def waiting(connect: Connect) -> None:
    with connect() as sock:
        assert sock.recv(1) == b""


def crowd(connect: Connect) -> None:
    get, waits = b"GET /v1/sessions HTTP/1.1\r\n" + SHOWN, b"expect: 100-continue\r\ncontent-length: 100\r\n"
    with ExitStack() as stack:
        server = stack.enter_context(running_server(token=TOKEN, loaded=True))
        most = max(int(each) for each in os.listdir(f"/proc/{server.pid}/fd")) + 80
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (most, most))
        host = f"host: localhost:{server.port}\r\n".encode()

        def opened(data: bytes) -> socket.socket:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S))
            sock.sendall(data)
            return sock

        known = opened(get + host + b"\r\n")
        assert read_answer(known).status == 200
        for _ in range(3 * most):
            opened(b"GET")
        for sock in (known, opened(b"")):  # who has shown a token is not closed for the others, and who comes is served
            sock.sendall(get + host + b"\r\n")
            assert read_answer(sock).status == 200
        assert server.log.count("file descriptors is left") == 1

        raw = stack.enter_context(RawClient(server.url, TOKEN))
        (worker,) = raw.begun("s")
        put = f"PUT {worker.path}/contents HTTP/1.1\r\ncontent-type: {MSGPACK}\r\n".encode() + SHOWN + host + waits
        while (answer := opened(put + b"\r\n").recv(1 << 12)).startswith(b"HTTP/1.1 100"):
            pass  # each is under way, and makes no room
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in answer
        assert b'"busy"' in answer


def blank(connect: Connect) -> None:
    most = CONNECTION.blank.most_bytes
    with sent(connect, b"\r\n" * (most // 2), GET) as sock:
        assert read_answer(sock).status == 200
    refused(connect, 400, "invalid_request", b"\r\n" * (most // 2), b"\r\n")
    with sent(connect, GET) as sock:  # an empty line is no request, and puts no deadline off
        assert read_answer(sock).status == 200
        sock.sendall(b"\r\n")
        assert sock.recv(1) == b""


def head(connect: Connect) -> None:
    limit = CONNECTION.head
    refused(connect, 408, "invalid_request", GET[:-2])
    refused(connect, 431, "limit_exceeded", b"GET / HTTP/1.1\r\na: " + b"a" * limit.most_bytes)
    refused(connect, 431, "limit_exceeded", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (limit.most + 1) + b"\r\n")


def early(connect: Connect) -> None:
    count = 2000
    with sent(connect, GET * count + GET[:10]) as sock:
        begun = b""
        while begun.count(b"HTTP/1.1 200 OK") < count:
            begun += sock.recv(1 << 16)
        begun = begun[begun.rindex(b"HTTP/1.1") :]
        while b"HTTP/1.1 408" not in begun:
            begun += sock.recv(1 << 16)
        assert is_closed(sock)


def body(connect: Connect) -> None:
    post = b"POST / HTTP/1.1\r\nhost: x\r\n"
    refused(connect, 400, "truncated", post + b"content-length: 1000\r\n\r\n", b"half")
    refused(connect, 400, "truncated", post + b"content-length: 1000\r\n\r\n")
    refused(connect, 400, "truncated", CHUNKED + b"\r\n", b"4\r\nhalf\r\n")
    refused(connect, 400, "truncated", CHUNKED + b"\r\n", b"4\r\nhalf\r\n0\r\na: b\r\n")


def chunk(connect: Connect) -> None:
    limit = CONNECTION.chunk
    extension = b";" + b"e" * (limit.most_bytes - 4)
    whole = [b"1" + extension + b"\r\na\r\n", b"0" + extension + b"\r\n\r\n"]
    with sent(connect, CHUNKED + b"\r\n", *whole) as sock:
        assert read_answer(sock).body == b"1"
    refused(connect, 413, "limit_exceeded", CHUNKED + b"\r\n", b"1" + extension + b"e\r\na\r\n")
    refused(connect, 413, "limit_exceeded", CHUNKED + b"\r\n", b"1;" + b"e" * 100_000)
    refused(connect, 413, "limit_exceeded", CHUNKED + b"\r\n", b"1\r\na\r\n" * (limit.most + 100))


def trailers(connect: Connect) -> None:
    limit = CONNECTION.trailers
    line = b"a: " + b"b" * (limit.most_bytes // limit.most - 6) + b"\r\n"
    with sent(connect, CHUNKED + b"\r\n", b"1\r\na\r\n0\r\n" + line * limit.most + b"\r\n") as sock:
        assert read_answer(sock).body == b"1"
    refused(connect, 413, "limit_exceeded", CHUNKED + b"\r\n", b"0\r\n", b"a:\r\n" * (limit.most + 1))
    refused(connect, 413, "limit_exceeded", CHUNKED + b"\r\n", b"0\r\n", b"a: " + b"b" * limit.most_bytes)


def unauthorized(connect: Connect) -> None:
    with sent(connect, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n", b"trickle") as sock:
        assert read_answer(sock).code == "unauthorized"
        assert is_closed(sock)
    most = CONNECTION.refused.most_bytes
    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    with sent(connect, head % most, bytes(most), GET) as sock:  # what is small is read, and the connection goes on
        assert [read_answer(sock).code for _ in range(2)] == ["unauthorized", "unauthorized"]
    with sent(connect, head % (most + 2), bytes(most + 1)) as sock:
        assert read_answer(sock).code == "unauthorized"
        assert is_closed(sock)


def dropped(connect: Connect) -> None:
    head = b"POST /unread HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n" + SHOWN + b"\r\n"
    with sent(connect, head % 1_000_000, b"trickle") as sock:
        assert read_answer(sock).code == "unsupported_media"
        assert is_closed(sock)
    large = 4 * CONNECTION.refused.most_bytes
    with sent(connect, head % large, bytes(large), GET.replace(b"\r\n\r\n", b"\r\n" + SHOWN + b"\r\n")) as sock:
        assert [read_answer(sock).status for _ in range(2)] == [415, 200]


def reading(connect: Connect) -> None:
    payload = bytes(1 << 20)
    with connect(1 << 12) as sock:
        sock.sendall(echo(payload, times=64))
        received = 0
        while piece := _received(sock, 16):  # 16 bytes at a time is progress, but too little
            received += len(piece)
        assert received < len(payload) * 64


def _received(sock: socket.socket, most: int) -> bytes:
    try:
        return sock.recv(most)
    except ConnectionResetError:
        return b""


def idle(connect: Connect) -> None:
    with sent(connect, GET) as sock:
        assert read_answer(sock).status == 200
        assert sock.recv(1) == b""


WALKS = {
    "waiting": waiting,
    "crowd": crowd,
    "blank": blank,
    "head": head,
    "early": early,
    "body": body,
    "chunk": chunk,
    "trailers": trailers,
    "refused": unauthorized,
    "dropped": dropped,
    "reading": reading,
    "idle": idle,
}


@pytest.mark.promise(
    "A connection lives no longer, and costs no more, than docs/limits.md says for its state.",
    area="limits",
)
@pytest.mark.parametrize("state", list(CONNECTION.rows()))
def test_a_state_ends_where_the_table_says(state: str):
    """A connection that is in a state beyond its time, or its budget, is ended; within them it goes on."""
    app = Echo() if state == "reading" else Pieces()
    with serving(app, Hasty, [TOKEN] if state in ("refused", "dropped") else []) as connect:
        WALKS[state](connect)


@pytest.mark.parametrize(
    "framed",
    [
        b"x\r\n",
        b"-1\r\na\r\n",
        b"0x1\r\na\r\n",
        b"\r\n",
        b" 1\r\na\r\n",
        b"1\na\n",
        b"1\r\nab\r\n",
        b"1\r\na\n",
        b"1;a\nb\r\na\r\n",
        b"0\r\nno trailer\r\n\r\n",
        b"0\r\na: b\n\r\n",
        b"0\r\n folded\r\n\r\n",
        b"1" * 16 + b"\r\n",
    ],
)
@pytest.mark.parametrize("application", [Pieces, Echo])
def test_what_is_not_framed_as_chunks_is_refused(application: type[Pieces] | type[Echo], framed: bytes):
    """Where the next request would begin is not guessed: the answer is a problem document, and the last one."""
    kind = f"content-type: {MSGPACK}\r\n\r\n".encode()
    with serving(application()) as connect:
        refused(connect, 400, "invalid_request", CHUNKED + kind, framed)


def in_chunks(whole: bytes, *sizes: int) -> bytes:
    """Return a request of known length as one in chunks of these sizes in turn, with extensions and trailers."""
    head, _, body = whole.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"content-length")]
    framed, at, turn = b"", 0, 0
    while at < len(body):
        piece = body[at : at + sizes[turn % len(sizes)]]
        framed += b"%X;name=value\r\n%s\r\n" % (len(piece), piece)
        at, turn = at + len(piece), turn + 1
    return b"\r\n".join([*lines, b"transfer-encoding: chunked", b"", framed + b"0\r\nx-after: 1\r\n\r\n"])


@pytest.mark.parametrize("sizes", [(1,), (7, 100), (100_000,), (1 << 20, 3)])
@pytest.mark.parametrize("step", [1 << 22, 5000])
def test_a_body_in_chunks_arrives_where_it_is_used(sizes: tuple[int, ...], step: int):
    """Chunks of any size, in packets of any size, make the same message, and the next one may follow."""
    payload = bytes(range(256)) * (16 if sizes == (1,) else 4096)
    whole = in_chunks(echo(payload), *sizes)
    if sizes == (1,):
        whole = in_chunks(echo(payload[: CONNECTION.chunk.most - 100]), *sizes)
        payload = payload[: CONNECTION.chunk.most - 100]
    with serving(Echo()) as connect, connect() as sock:
        for _ in range(2):
            for at in range(0, len(whole), step):
                sock.sendall(whole[at : at + step])
            assert read_answer(sock).payload == payload
        sock.sendall(whole + echo(b"behind it"))
        answer, begun = read_one(sock, b"")
        assert answer == payload
        assert read_one(sock, begun) == (b"behind it", b"")


def test_a_refused_body_in_chunks_is_read_to_its_end():
    """A message in chunks that is refused at its header is answered, and the same connection takes the next one."""
    with serving(Echo()) as connect, connect() as sock:
        sock.sendall(in_chunks(request({"refuse": True}, bytes(1 << 21)), 60_000))
        assert read_answer(sock).code == "tensor_mismatch"
        sock.sendall(echo(b"next"))
        assert read_answer(sock).payload == b"next"


def test_trailers_are_not_headers():
    """What follows the body says nothing about the request: an application sees the headers of the head alone."""
    app = Pieces()
    with serving(app) as connect, sent(connect, CHUNKED + b"\r\n", b"1\r\na\r\n0\r\nx-late: 1\r\n\r\n") as sock:
        assert read_answer(sock).status == 200
    assert [name for name, _ in app.headers] == [b"host", b"transfer-encoding"]


def test_a_token_in_a_trailer_is_none():
    """A request whose token comes behind its body has shown none."""
    with serving(Pieces(), tokens=[TOKEN]) as connect:
        with sent(connect, CHUNKED + b"\r\n", b"0\r\n" + SHOWN + b"\r\n") as sock:
            assert read_answer(sock).status == 401
        with sent(connect, CHUNKED + SHOWN + b"\r\n", b"0\r\n\r\n") as sock:
            assert read_answer(sock).status == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00",
        b"hello\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"GET / HTTP/1.1\nhost: x\n\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    ],
)
def test_what_is_not_http_is_answered_as_everything_else(garbage: bytes):
    """Malformed HTTP gets a problem document with a code."""
    with serving(Pieces()) as connect:
        refused(connect, 400, "invalid_request", garbage)


def test_codings_besides_chunked_are_refused():
    """A body that is compressed for the transfer is refused by name."""
    with serving(Pieces()) as connect:
        head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n"
        refused(connect, 415, "unsupported_media", head)
