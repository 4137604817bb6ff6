"""No wait is endless: each of httpx's timeouts works, and one deadline holds for the whole exchange."""

import itertools
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from farstep.transport import BufferedBody, SocketTransport, body_of, dial_tcp
from farstep.transport.pool import Origin
from tests.support.transport.scripted import PATIENCE_S, Peer, Stage

Staging = Callable[..., Stage]
SHORT_S = 0.15


def stall(peer: Peer) -> None:
    """Read the request and say nothing."""
    peer.read_request()
    peer.over.wait(PATIENCE_S)


def stall_in_the_head(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-")
    peer.over.wait(PATIENCE_S)


def stall_in_the_body(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123")
    peer.over.wait(PATIENCE_S)


def stall_in_a_chunk(peer: Peer) -> None:
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    peer.over.wait(PATIENCE_S)


def dribble(peer: Peer) -> None:
    """Send a byte now and then, so that no single read takes long."""
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    try:
        while not peer.over.wait(0.01):
            peer.send(b"x")
    except OSError:
        return


def flood(peer: Peer) -> None:
    """Send without end, so that no read ever waits."""
    peer.read_request()
    peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
    try:
        while not peer.over.is_set():
            peer.send(bytes(1 << 20))
    except OSError:
        return


def ignore(peer: Peer) -> None:
    """Read nothing."""
    peer.over.wait(PATIENCE_S)


@pytest.mark.parametrize("server", [stall, stall_in_the_head, stall_in_the_body, stall_in_a_chunk])
def test_silence_is_a_read_timeout(stage: Staging, transport: SocketTransport, server: Callable[[Peer], None]):
    """A server that stops talking anywhere in its answer is given up after the read timeout."""
    with httpx.Client(transport=transport, timeout=httpx.Timeout(PATIENCE_S, read=SHORT_S)) as client:
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout) as caught:
            client.post(stage(server).url, content=b"abc")
        assert SHORT_S <= time.monotonic() - began < PATIENCE_S / 2
    assert caught.value.request.method == "POST"


def test_a_server_that_does_not_read_is_a_write_timeout(stage: Staging, transport: SocketTransport):
    """A body that nobody takes is given up after the write timeout."""
    with httpx.Client(transport=transport, timeout=httpx.Timeout(PATIENCE_S, write=SHORT_S)) as client:
        request = BufferedBody([bytes(50_000_000)]).request(client, "POST", stage(ignore).url)
        with pytest.raises(httpx.WriteTimeout):
            client.send(request)


def test_a_timed_out_request_is_not_repeated(stage: Staging, transport: SocketTransport):
    """After a timeout the outcome is unknown; a kept connection and a name do not change that."""

    def answer_then_stall(peer: Peer) -> None:
        peer.read_request()
        peer.answer()
        stall(peer)

    server = stage(answer_then_stall)
    with httpx.Client(transport=transport, timeout=httpx.Timeout(PATIENCE_S, read=SHORT_S)) as client:
        client.get(server.url)
        with pytest.raises(httpx.ReadTimeout):
            client.get(server.url, extensions={"farstep_named": True})


def test_a_full_listener_is_a_connect_timeout(transport: SocketTransport):
    """A machine that does not answer at all is given up after the connect timeout."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = []
        for _ in range(4):  # fills the queue of connections nobody accepts
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(("127.0.0.1", port))
        with (
            httpx.Client(transport=transport, timeout=httpx.Timeout(PATIENCE_S, connect=SHORT_S)) as client,
            pytest.raises(httpx.ConnectTimeout, match="did not answer in time"),
        ):
            client.get(f"http://127.0.0.1:{port}/")
        for each in waiting:
            each.close()


def test_all_addresses_share_the_connect_timeout():
    """A name with several addresses does not get the time once for each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address)] * 20
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            dial_tcp(Origin("http", "many.invalid", 80, ""), SHORT_S, resolve=lambda *_, **__: found)
        assert time.monotonic() - began < 10 * SHORT_S
        for each in waiting:
            each.close()


def test_tls_that_never_begins_is_a_connect_timeout(stage: Staging):
    """A server that accepts and never speaks TLS is given up after the connect timeout."""
    url = stage(ignore).url.replace("http:", "https:")
    with (
        httpx.Client(transport=SocketTransport(), timeout=httpx.Timeout(PATIENCE_S, connect=SHORT_S)) as client,
        pytest.raises(httpx.ConnectTimeout, match="did not begin TLS in time"),
    ):
        client.get(url)


def drain(client: httpx.Client, url: str) -> None:
    """Read an answer to its end, with a deadline."""
    with client.stream("GET", url, extensions={"farstep_deadline_s": SHORT_S}) as response:
        body, view = body_of(response), memoryview(bytearray(65536))
        while body.readinto(view):
            pass


@pytest.mark.parametrize("server", [stall, dribble, flood])
def test_a_deadline_ends_the_whole_exchange(stage: Staging, transport: SocketTransport, server: Callable[[Peer], None]):
    """However busy the server keeps us, the exchange ends at its deadline, in the middle of a body too."""
    with httpx.Client(transport=transport, timeout=None) as client:
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            drain(client, stage(server).url)
        assert SHORT_S <= time.monotonic() - began < PATIENCE_S / 2


def test_a_deadline_ends_a_sending_that_never_waits(uvicorn_url: str, transport: SocketTransport):
    """A body without end is stopped at the deadline even if the server takes every byte."""
    endless = itertools.repeat(bytes(65536))
    with httpx.Client(transport=transport, timeout=None) as client, pytest.raises(httpx.WriteTimeout):
        client.post(f"{uvicorn_url}/digest", content=endless, extensions={"farstep_deadline_s": SHORT_S})


def test_a_deadline_holds_for_connecting(stage: Staging, transport: SocketTransport):
    """A deadline that has passed leaves no time to connect, and one to come shortens the connect timeout."""
    given: list[float | None] = []

    def dial(origin: Origin, timeout_s: float | None) -> socket.socket:
        given.append(timeout_s)
        raise TimeoutError

    with httpx.Client(transport=SocketTransport(dial=dial), timeout=httpx.Timeout(5)) as client:
        for deadline_s in (None, 1.0, 60.0):
            with pytest.raises(httpx.ConnectTimeout):
                client.get("http://127.0.0.1/", extensions={"farstep_deadline_s": deadline_s})
    assert given[0] == 5
    assert given[1] is not None
    assert 0.5 < given[1] <= 1.0
    assert given[2] == 5


def test_a_vanished_machine_is_noticed():
    """TCP itself asks after a silent machine, for users who want no timeouts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        with dial_tcp(Origin("http", host, port, host), 5) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
