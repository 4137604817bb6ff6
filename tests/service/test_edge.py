"""The edge of a connection: heads that do not come or are too long, bodies that do not fit, readers who are slow."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from typing import Any

import pytest

from farstep_service.limits import CONNECTION, ConnectionLimits
from farstep_service.routes import Pace
from farstep_service.server.protocol import Protocol
from tests.support.service.answers import MSGPACK, TIMEOUT_S, read_answer
from tests.support.service.echoing import Echo, echo, read_one, request, serving

PAYLOAD = bytes(range(256)) * 4096


class Hasty(Protocol):
    """A connection with little patience."""

    limits = ConnectionLimits(
        head=replace(CONNECTION.head, within_s=0.05), reading=replace(CONNECTION.reading, silent_s=0.2)
    )


def test_a_silent_connection_is_closed():
    """Who connects and never asks is sent away without a word."""
    with serving(Echo(), Hasty) as connect:
        assert connect().recv(1) == b""


def test_half_a_head_is_answered():
    """A head that does not end in time gets 408 as a problem document, and the connection is closed."""
    with serving(Echo(), Hasty) as connect:
        sock = connect()
        sock.sendall(b"GET /v1/sessions HTTP/1.1\r\nhost: x\r\nx-slow: ")
        answer = read_answer(sock)
        assert (answer.status, answer.document["code"]) == (408, "invalid_request")
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    "lines",
    [
        [f"x-{number}: 1" for number in range(CONNECTION.head.most + 1)],
        [f"x-long: {'a' * CONNECTION.head.most_bytes}"],
        ["x-endless: " + "a" * 2 * CONNECTION.head.most_bytes],
    ],
    ids=["many", "long", "endless"],
)
def test_a_head_that_is_too_large_is_refused(lines: list[str]):
    """Too many headers, or too long ones, get 431 as a problem document, complete or not."""
    end = "" if "endless" in lines[0] else "\r\n\r\n"
    with serving(Echo()) as connect:
        sock = connect()
        sock.sendall(("GET /healthz HTTP/1.1\r\n" + "\r\n".join(lines) + end).encode())
        answer = read_answer(sock)
        assert (answer.status, answer.document["code"]) == (431, "limit_exceeded")
        assert answer.document["status"] == 431


def test_a_connection_goes_on_after_bodies():
    """Requests follow each other on one connection, with bodies of any size, in any pieces, and even in one packet."""
    with serving(Echo()) as connect:
        sock = connect()
        for payload in (b"", b"a", PAYLOAD, b"b" * 100_000, PAYLOAD * 3):
            sock.sendall(echo(payload))
            assert read_answer(sock).payload == payload
        for byte in echo(b"slowly"):
            sock.sendall(bytes([byte]))
        assert read_answer(sock).payload == b"slowly"
        sock.sendall(echo(b"first") + echo(PAYLOAD) + echo(b"third"))
        begun = b""
        for payload in (b"first", PAYLOAD, b"third"):
            answer, begun = read_one(sock, begun)
            assert answer == payload


def test_a_refused_body_is_read_to_its_end():
    """A message that is refused at its header is answered, and the same connection takes the next one."""
    with serving(Echo()) as connect:
        sock = connect()
        for _ in range(2):
            sending = threading.Thread(target=sock.sendall, args=(request({"refuse": True}, PAYLOAD * 8),))
            sending.start()
            answer = read_answer(sock)
            sending.join()
            assert (answer.status, answer.document["code"]) == (422, "tensor_mismatch")
        sock.sendall(echo(b"next"))
        assert read_answer(sock).payload == b"next"


def test_a_body_that_stops_is_given_up():
    """A body that falls silent is answered, and the connection is cut if nothing more comes."""
    with serving(Echo()) as connect:
        sock = connect()
        whole = echo(PAYLOAD)
        sock.sendall(whole[: len(whole) // 2])
        answer = read_answer(sock)
        assert answer.document["code"] == "truncated"
        assert sock.recv(1) == b""


def test_a_client_that_goes_away_leaves_nothing():
    """A connection that ends within a body ends quietly, and the server goes on."""
    with serving(Echo()) as connect:
        sock = connect()
        whole = echo(PAYLOAD)
        sock.sendall(whole[: len(whole) // 2])
        sock.close()
        other = connect()
        other.sendall(echo(PAYLOAD))
        assert read_answer(other).payload == PAYLOAD


def test_a_client_may_ask_before_it_sends():
    """`Expect: 100-continue` is answered before the body comes."""
    with serving(Echo()) as connect:
        sock = connect()
        head, _, body = echo(b"patient").partition(b"\r\n\r\n")
        sock.sendall(head + b"\r\nexpect: 100-continue\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        assert read_answer(sock).payload == b"patient"


def test_a_reader_that_does_not_read_is_cut_off():
    """A client that takes nothing of its answer loses it, and what the answer held is free."""
    app = Echo()
    with serving(app, Hasty) as connect:
        sock = connect(1 << 12)
        sock.sendall(echo(PAYLOAD, times=64))
        assert app.answered.wait(TIMEOUT_S)
        with pytest.raises((ConnectionError, json.JSONDecodeError, AssertionError)):
            read_answer(sock)


@pytest.mark.promise("A body that stalls or trickles is given up, and nothing has changed.", area="limits")
@pytest.mark.parametrize(
    ("received", "elapsed_s", "refused"), [(0, 29.0, False), (10_000, 31.0, True), (2**30, 60.0, False)]
)
def test_a_body_has_a_least_rate(received: int, elapsed_s: float, refused: bool):
    """A byte now and then is not progress: on the whole a body has to come at 16 KiB a second."""
    error = Pace(30.0).too_slow(received, 2**30, elapsed_s, silent=False)
    assert (error is not None) == refused


def test_a_plain_server_gives_pieces():
    """Without our protocol the same body comes in pieces, as every ASGI server has it."""
    pieces = [echo(PAYLOAD).partition(b"\r\n\r\n")[2]]
    pieces = [pieces[0][:1000], pieces[0][1000:]]
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    size = sum(map(len, pieces))
    headers = [(b"content-type", MSGPACK.encode()), (b"content-length", str(size).encode())]
    asyncio.run(Echo()({"type": "http", "headers": headers}, receive, send))
    assert b"".join(bytes(each.get("body", b"")) for each in sent).endswith(PAYLOAD[-1000:])
