"""Connections are kept, replaced when that is harmless, and never shared by mistake."""

import gc
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from farstep.transport import BufferedBody, SocketTransport, body_of, dial_tcp
from farstep.transport.pool import Origin
from tests.support.forks import in_a_fork
from tests.support.transport.scripted import PATIENCE_S, Peer, Stage
from tests.support.transport.scripts import answer_all, answer_once, answer_then_hang_up, answer_then_reset

Staging = Callable[..., Stage]


def test_a_connection_is_used_again(stage: Staging, client: httpx.Client):
    """Requests one after the other go over one connection."""
    server = stage(answer_all)
    for _ in range(5):
        assert client.post(server.url, content=b"x").content == b"ok"
    client.close()


def test_small_requests_leave_in_one_packet(stage: Staging, client: httpx.Client):
    """Head and body are given to the kernel in one call, so a server reads both at once."""
    seen = []

    def read_once(peer: Peer) -> None:
        seen.append(peer.sock.recv(65536))
        peer.answer()

    server = stage(read_once)
    client.send(BufferedBody([b"abc", b"def"]).request(client, "POST", server.url))
    assert seen[0].endswith(b"\r\n\r\nabcdef")


@pytest.mark.parametrize("farewell", [answer_then_hang_up, answer_then_reset])
def test_a_harmless_request_is_sent_again(stage: Staging, client: httpx.Client, farewell: Callable[[Peer], None]):
    """When a kept connection ends before any answer, a named or idempotent request goes over a new one, whole."""
    bodies = []

    def keep(peer: Peer) -> None:
        bodies.append(peer.read_request()[1])
        peer.answer(b"second")

    for method, extensions in (("PUT", {}), ("POST", {"farstep_named": True})):
        server = stage(farewell, keep)
        client.post(server.url)
        request = BufferedBody([b"all ", b"of it"]).request(client, method, server.url, extensions=extensions)
        assert client.send(request).content == b"second"
    assert bodies == [b"all of it"] * 2


@pytest.mark.parametrize("farewell", [answer_then_hang_up, answer_then_reset])
def test_a_request_without_a_name_is_not_repeated(
    stage: Staging, client: httpx.Client, farewell: Callable[[Peer], None]
):
    """A POST that the server might have carried out raises, and whoever sent it decides."""
    server = stage(farewell)
    client.post(server.url)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)) as caught:
        client.post(server.url, content=b"x")
    assert caught.value.request.method == "POST"


def test_a_body_that_can_be_read_once_is_not_repeated(stage: Staging, client: httpx.Client):
    """A generator is used up by the first sending, so even a PUT of it raises."""
    server = stage(answer_then_hang_up)
    client.post(server.url)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)):
        client.put(server.url, content=iter([b"x"]))


def test_a_new_connection_is_not_replaced(stage: Staging, client: httpx.Client):
    """A server that hangs up on a fresh connection has a reason; nothing is sent again, whatever its name."""
    server = stage(lambda peer: (peer.read_head(), None)[1])
    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        client.get(server.url, extensions={"farstep_named": True})


def test_a_repetition_is_not_repeated(stage: Staging, client: httpx.Client):
    """A request is sent twice at most."""
    server = stage(answer_then_hang_up, lambda peer: (peer.read_head(), None)[1])
    client.get(server.url)
    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        client.get(server.url)


def test_half_an_answer_is_not_a_closed_connection(stage: Staging, client: httpx.Client):
    """Once a byte of the answer has come, the server has had the request, and it is not sent again."""

    def half(peer: Peer) -> None:
        answer_then_hang_up(peer)
        peer.send(b"HTTP/1.1 200")

    server = stage(half)
    client.get(server.url)
    with pytest.raises(httpx.RemoteProtocolError):
        client.get(server.url)


def test_a_connection_that_was_closed_while_idle_is_noticed(stage: Staging, client: httpx.Client):
    """A server may close a kept connection between requests; the next one, of any kind, takes a new one."""
    closed = threading.Event()

    def answer_and_close(peer: Peer) -> None:
        answer_once(peer)
        peer.close()
        closed.set()

    server = stage(answer_and_close, answer_once)
    client.post(server.url)
    assert closed.wait(PATIENCE_S)
    assert client.post(server.url).content == b"ok"


def test_an_answer_nobody_asked_for_costs_the_connection(stage: Staging, client: httpx.Client):
    """Bytes beyond the answer are never taken for the next answer."""

    def twice(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" * 2)

    server = stage(twice, answer_once)
    for _ in range(2):
        assert client.post(server.url).content == b"ok"


@pytest.mark.parametrize("head", ["HTTP/1.1 200 OK\r\nConnection: close\r\n", "HTTP/1.0 200 OK\r\n"])
def test_a_server_may_ask_for_one_request_only(stage: Staging, client: httpx.Client, head: str):
    """After `Connection: close`, or in HTTP/1.0, the next request takes a new connection."""

    def once(peer: Peer) -> None:
        peer.read_request()
        peer.send(head.encode() + b"Content-Length: 2\r\n\r\nok")
        assert peer.sock.recv(1) == b""

    server = stage(once, once)
    for _ in range(2):
        assert client.post(server.url).content == b"ok"


def test_idle_connections_are_bounded_and_expire(stage: Staging):
    """No more idle connections are kept than asked for, and none for longer than asked for."""
    for options in ({"idle_connections": 0}, {"idle_s": 0.0}):
        with SocketTransport(**options) as transport, httpx.Client(transport=transport) as client:
            server = stage(answer_all, answer_all)
            for _ in range(2):
                client.get(server.url)


def test_threads_share_a_transport(uvicorn_url: str):
    """Many threads over one client each get the answer to their own request."""
    with httpx.Client(transport=SocketTransport(idle_connections=2), timeout=PATIENCE_S) as client:

        def ask(number: int) -> bool:
            data = str(number).encode() * (number * 50)
            return client.post(f"{uvicorn_url}/echo", content=data).content == data

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(ask, range(200)))


def test_closing_ends_idle_connections(stage: Staging, transport: SocketTransport):
    """A closed transport has no connection left: the server sees the end of each."""
    ended = threading.Event()

    def until_end(peer: Peer) -> None:
        answer_all(peer)
        ended.set()

    server = stage(until_end)
    transport.handle_request(httpx.Request("GET", server.url)).read()
    transport.close()
    assert ended.wait(PATIENCE_S)


def test_closing_wakes_a_waiting_thread(stage: Staging):
    """A thread that waits for an answer gets an error when another closes the transport, not an endless wait."""
    asked = threading.Event()

    def silent(peer: Peer) -> None:
        peer.read_request()
        asked.set()
        peer.over.wait(PATIENCE_S)

    server = stage(silent)
    transport = SocketTransport()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(transport.handle_request, httpx.Request("GET", server.url))
        assert asked.wait(PATIENCE_S)
        transport.close()
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            waiting.result(PATIENCE_S)


def test_closing_ends_a_body_that_is_being_read(stage: Staging, transport: SocketTransport):
    """A response that is still being read when the transport closes fails instead of waiting."""

    def half(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        peer.over.wait(PATIENCE_S)

    server = stage(half)
    body = body_of(transport.handle_request(httpx.Request("GET", server.url)))
    assert body.readinto(memoryview(bytearray(10))) == 4
    transport.close()
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        body.readinto(memoryview(bytearray(10)))


def ask_and_forget(transport: SocketTransport, url: str) -> None:
    transport.handle_request(httpx.Request("GET", url))
    gc.collect()


def test_a_forgotten_response_gives_its_connection_back(stage: Staging, transport: SocketTransport):
    """A response that nobody read or closed takes its socket with it."""
    ended = threading.Event()

    def until_end(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        assert peer.sock.recv(1) == b""
        ended.set()

    server = stage(until_end)
    with pytest.warns(ResourceWarning, match="unclosed"):
        ask_and_forget(transport, server.url)
    assert ended.wait(PATIENCE_S)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_opens_its_own_connections(stage: Staging, client: httpx.Client):
    """A forked process does not touch its parent's connection, and the parent goes on using it."""
    heads = []

    def note(peer: Peer) -> None:
        while head := peer.read_request()[0]:
            heads.append(head.split()[1])
            peer.answer()

    server = stage(note, answer_once)
    client.get(f"{server.url}/parent")

    def post() -> None:
        with pytest.raises(httpx.ReadTimeout):  # the second connection is served after the first has ended
            client.post(f"{server.url}/child", timeout=httpx.Timeout(PATIENCE_S, read=0.2))

    assert in_a_fork(post) == 0
    client.get(f"{server.url}/parent")
    assert heads == ["/parent", "/parent"]
    client.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_cannot_read_its_parents_body(stage: Staging, client: httpx.Client):
    """A response belongs to the process that asked: its fork gets an error and the parent all the bytes."""
    go_on = threading.Event()

    def slow(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        assert go_on.wait(PATIENCE_S)
        peer.send(b"-other")

    server = stage(slow)
    with client.stream("GET", server.url) as response:
        body, view = body_of(response), memoryview(bytearray(10))
        assert body.readinto(view) == 4

        def read() -> None:
            with pytest.raises(httpx.ReadError):
                body.readinto(view)

        assert in_a_fork(read) == 0
        go_on.set()
        assert body.readinto(view[4:]) == 6
        assert bytes(view) == b"half-other"


def test_another_way_to_connect_can_be_given(stage: Staging):
    """`dial` decides where a connection leads, here to a name that does not exist."""
    server = stage(answer_once)

    def dial(origin: Origin, timeout_s: float | None) -> socket.socket:
        assert (origin.scheme, origin.host, origin.port, timeout_s) == ("http", "elsewhere.invalid", 80, 3)
        return dial_tcp(origin._replace(host="127.0.0.1", port=server.port), timeout_s)

    with httpx.Client(transport=SocketTransport(dial=dial), timeout=3) as client:
        assert client.get("http://elsewhere.invalid/").content == b"ok"


def test_a_socket_file_is_a_place_to_connect_to(tmp_path):
    """A connection need not be TCP: whatever stream `dial` makes carries requests."""
    here, there = socket.socketpair()
    with httpx.Client(transport=SocketTransport(dial=lambda *_: here)) as client, there, ThreadPoolExecutor(1) as other:
        served = other.submit(answer_once, Peer(there, threading.Event()))
        assert client.post("http://anything.invalid/", content=b"x").content == b"ok"
        served.result(PATIENCE_S)


def test_other_schemes_are_refused(client: httpx.Client):
    """Only http and https can be connected to."""
    with pytest.raises(httpx.UnsupportedProtocol, match="http:// or https://"):
        client.get("ftp://127.0.0.1/")


def test_refused_connections_say_so(transport: SocketTransport):
    """A port where nobody listens is a ConnectError that names it, and carries the request without a client too."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    request = httpx.Request("GET", f"http://127.0.0.1:{port}/")
    with pytest.raises(httpx.ConnectError, match=rf"127\.0\.0\.1:{port}") as caught:
        transport.handle_request(request)
    assert caught.value.request is request
