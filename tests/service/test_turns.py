"""Requests that came before the one ahead of them was answered take turns, a few at a time."""

from __future__ import annotations

import asyncio
import itertools
import socket

from starlette.types import Receive, Scope, Send

from farstep_service.server.connection_turns import TURN_S, ConnectionTurns
from tests.support.service.echoing import serving

GET = b"GET /%s HTTP/1.1\r\nhost: x\r\n\r\n"


class Backlog:
    """A connection with requests that wait."""

    def __init__(self, name: str, count: int, turns: ConnectionTurns, order: list[str]) -> None:
        self.name, self.left, self.turns, self.order = name, count, turns, order
        turns.wait(self)

    def take_turn(self) -> None:
        self.order.append(self.name)
        self.left -= 1
        if self.left:
            self.turns.wait(self)


def turned(step_s: float, counts: dict[str, int]) -> list[str]:
    """Return the order in which requests begin that take so long each, and `|` where the event loop turned."""

    async def talk() -> list[str]:
        order: list[str] = []
        clock = itertools.count()
        turns = ConnectionTurns(asyncio.get_running_loop(), lambda: step_s * next(clock))
        waiting = [Backlog(name, count, turns, order) for name, count in counts.items()]
        while any(each.left for each in waiting):
            await asyncio.sleep(0)
            order.append("|")
        return order

    return asyncio.run(talk())


def test_connections_take_turns() -> None:
    """One request of each connection in a turn, however many each of them has."""
    assert "".join(turned(0.0, {"a": 3, "b": 1, "c": 2})).replace("||", "|").strip("|") == "abc|ac|a"


def test_a_turn_is_short() -> None:
    """When requests take long, the event loop turns after each; who came first is first again."""
    order = "".join(turned(2 * TURN_S, {"a": 2, "b": 2, "c": 1}))
    assert order.replace("|", "") == "abcab"
    assert all(first == "|" or second == "|" for first, second in itertools.pairwise(order))


class Noting:
    """An application that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(scope["path"])
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def count_answers(sock: socket.socket, count: int) -> None:
    begun = b""
    while begun.count(b"HTTP/1.1 200 OK") < count:
        begun += sock.recv(1 << 16)


def test_requests_sent_at_once_are_answered_in_order() -> None:
    """Thousands of requests in one write are all answered, in their order."""
    app, count = Noting(), 3000
    with serving(app) as connect, connect() as sock:
        sock.sendall(b"".join(GET % str(number).encode() for number in range(count)))
        count_answers(sock, count)
    assert app.asked == [f"/{number}" for number in range(count)]


def test_what_follows_a_body_is_not_taken_for_it() -> None:
    """Bodies of known length and in chunks and requests without one may follow each other in one write."""
    app = Noting()
    sized = b"POST /sized HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nGET "
    chunked = b"POST /chunked HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n4\r\nGET \r\n0\r\n\r\n"
    with serving(app) as connect, connect() as sock:
        sock.sendall((sized + chunked + GET % b"get") * 50)
        count_answers(sock, 150)
    assert app.asked == ["/sized", "/chunked", "/get"] * 50
