"""Heads that a connection repeats: which are kept, and that what follows one is still read as it is."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from farstep_service.server.repeated import RequestHead
from tests.support.service.answers import read_answer
from tests.support.service.echoing import Echo, echo, read_one, serving

RAW = b"POST /push HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n"


def scope_of(*headers: tuple[bytes, bytes], version: str = "1.1") -> dict[str, Any]:
    """Return what a parser makes of a head with these headers."""
    return {"path": "/push", "http_version": version, "headers": list(headers), "state": {}, "extensions": {}}


def test_a_head_is_recognised_with_its_body_and_nothing_else():
    """Less or more than one whole request is for the parser."""
    head = RequestHead.of(RAW + b"body", scope_of((b"host", b"x"), (b"content-length", b"4")))
    assert head is not None
    assert head.begins(RAW + b"more")
    assert not head.begins(RAW + b"bod")
    assert not head.begins(RAW + b"bodyP")
    assert not head.begins(RAW.replace(b"push", b"pull") + b"body")
    assert head.scope() == {
        "path": "/push",
        "http_version": "1.1",
        "headers": [(b"host", b"x"), (b"content-length", b"4")],
    }


@pytest.mark.parametrize(
    ("headers", "version"),
    [
        ([], "1.1"),
        ([(b"content-length", b"4"), (b"content-length", b"4")], "1.1"),
        ([(b"content-length", b"4x")], "1.1"),
        ([(b"content-length", b"5")], "1.1"),
        ([(b"content-length", b"4"), (b"connection", b"close")], "1.1"),
        ([(b"content-length", b"4"), (b"expect", b"100-continue")], "1.1"),
        ([(b"content-length", b"4"), (b"transfer-encoding", b"chunked")], "1.1"),
        ([(b"content-length", b"4")], "1.0"),
    ],
)
def test_a_head_that_says_more_is_parsed_each_time(headers: list[tuple[bytes, bytes]], version: str):
    """Whatever is about the connection, or where the body ends, is the parser's."""
    assert RequestHead.of(RAW + b"body", scope_of(*headers, version=version)) is None


def test_requests_with_the_same_head_have_bodies_of_their_own():
    """Step after step, whole in one packet or in pieces, or several in one."""
    payloads = [bytes([each]) * 100 for each in range(5)]
    with serving(Echo()) as connect:
        sock = connect()
        for payload in payloads:
            sock.sendall(echo(payload))
            assert read_answer(sock).payload == payload
        whole = echo(payloads[0])
        for cut in (1, 40, len(whole) - 1):
            sock.sendall(whole[:cut])
            sock.sendall(whole[cut:])
            assert read_answer(sock).payload == payloads[0]
        sock.sendall(b"".join(map(echo, payloads)))
        begun = b""
        for payload in payloads:
            answer, begun = read_one(sock, begun)
            assert answer == payload
        sock.sendall(echo(payloads[1]))
        assert read_answer(sock).payload == payloads[1]


def test_a_body_that_looks_like_a_request_is_a_body():
    """The rest of a refused body is never taken for the request that it spells."""
    inner = echo(b"never")
    with serving(Echo()) as connect:
        sock = connect()
        sock.sendall(inner)
        assert read_answer(sock).payload == b"never"
        outer = echo(inner, refuse=True)
        assert outer.endswith(inner)
        sock.sendall(outer[: -len(inner)])
        refused(sock)
        sock.sendall(inner)
        sock.sendall(echo(b"next"))
        assert read_answer(sock).payload == b"next"


def refused(sock: socket.socket) -> None:
    """Read an answer that refuses."""
    answer = read_answer(sock)
    assert (answer.status, answer.document["code"]) == (422, "tensor_mismatch")
