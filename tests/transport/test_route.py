"""Requests over a prepared route: the same bytes, errors and repetitions as over httpx's objects."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType
from typing import Any

import httpx
import pytest

from farstep.transport import DEADLINE_S, NAMED, Batch, BufferedBody, Route, SocketTransport, StreamedBody
from tests.support.transport.scripted import PATIENCE_S, Peer, Stage
from tests.support.transport.scripts import answer_once, answer_then_hang_up

Staging = Callable[..., Stage]

TIMEOUT = dict.fromkeys(("connect", "read", "write"), PATIENCE_S)


def route_to(url: str, extensions: Mapping[str, Any] = MappingProxyType({})) -> Route:
    """Return a route with a header of the user's."""
    told = {"timeout": TIMEOUT, **extensions}
    return Route(httpx.Request("POST", f"{url}/push", headers={"x-who": "w0"}, extensions=told))


def pieces(*parts: bytes) -> BufferedBody:
    """Return a body in pieces."""
    return BufferedBody(parts)


def supply(*parts: bytes) -> StreamedBody:
    """Return a body that is made while it is sent."""

    def begin() -> Generator[Batch]:
        yield from ([part] for part in parts)

    return StreamedBody(begin, sum(map(len, parts)))


def test_requests_over_a_route_have_bodies_of_their_own(stage: Staging, transport: SocketTransport):
    """Only the length in their heads differs, and they share a connection."""
    seen: list[tuple[str, bytes]] = []

    def answer_twice(peer: Peer) -> None:
        for _ in range(3):
            seen.append(peer.read_request())
            peer.answer(b"done")

    route = route_to(stage(answer_twice).url)
    for body in (pieces(b"abc", b"def"), pieces(b"g" * 10), supply(b"gg", b"g" * 8)):
        answer = transport.ask(route, body)
        assert (answer.ok, bytes(answer.body.arrived())) == (True, b"done")
        answer.body.skip(4)
        answer.close()
    heads, bodies = zip(*seen, strict=True)
    assert bodies == (b"abcdef", b"g" * 10, b"g" * 10)
    assert heads[0].startswith("POST /push HTTP/1.1\r\n")
    assert "x-who: w0\r\n" in heads[0]
    assert heads[1] == heads[2] == heads[0].replace("Length: 6", "Length: 10")


def test_what_has_not_arrived_is_read(stage: Staging, transport: SocketTransport):
    """A body may come later than its head, or in chunks, of which nothing counts as arrived."""

    def later(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfi")
        peer.read_request()

    with_part = transport.ask(route_to(stage(later).url), pieces(b"x"))
    assert bytes(with_part.body.arrived()) == b"fi"
    with_part.close()

    def in_chunks(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfour\r\n0\r\n\r\n")

    chunked = transport.ask(route_to(stage(in_chunks).url), pieces(b"x"))
    assert not chunked.body.arrived()
    buffer = memoryview(bytearray(8))
    assert (chunked.body.readinto(buffer), bytes(buffer[:4])) == (4, b"four")
    assert chunked.body.readinto(buffer) == 0


def test_an_error_is_told_by_httpxs_objects(stage: Staging, transport: SocketTransport):
    """Whoever explains it has status, headers and body, and the request."""

    def refuse(peer: Peer) -> None:
        peer.read_request()
        peer.answer(b'{"code": "busy"}', "503 Service Unavailable", "retry-after: 1\r\n")

    answer = transport.ask(route_to(stage(refuse).url), pieces(b"x"))
    response = answer.response()
    response.read()
    assert not answer.ok
    assert (response.status_code, response.headers["retry-after"], response.json()) == (503, "1", {"code": "busy"})
    assert response.url.path == "/push"


@pytest.mark.parametrize("named", [True, False])
def test_only_a_named_request_is_sent_again(stage: Staging, transport: SocketTransport, named: bool):
    """When a kept connection ends before any answer; else the error says which request it was."""
    server = stage(answer_then_hang_up, answer_once) if named else stage(answer_then_hang_up)
    route = route_to(server.url, {NAMED: named})
    first = transport.ask(route, pieces(b"x"))
    first.body.skip(len(first.body.arrived()))
    if named:
        answer = transport.ask(route, pieces(b"y"))
        assert answer.ok
        answer.close()
        return
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)) as caught:
        transport.ask(route, pieces(b"y"))
    assert caught.value.request is route.request


def test_a_server_that_says_nothing_is_given_up_in_time(stage: Staging, transport: SocketTransport):
    """The time limits of the route hold for each of its requests."""
    server = stage(lambda peer: peer.over.wait(PATIENCE_S))
    route = route_to(server.url, {"timeout": {**TIMEOUT, "read": 0.05}})
    with pytest.raises(httpx.ReadTimeout):
        transport.ask(route, pieces(b"x"))


def test_a_deadline_is_a_single_requests():
    """It begins with the request, so a route cannot have one."""
    with pytest.raises(ValueError, match="deadline"):
        route_to("http://127.0.0.1:1", {DEADLINE_S: 1.0})
