"""Odd answers: early, cut off, malformed. Each is read where there is something to read, and an error where not."""

import socket
import threading
from collections.abc import Callable, Generator, Iterator

import httpx
import pytest

from farstep.transport import Batch, SocketTransport, StreamedBody, dial_tcp
from farstep.transport.pool import Origin
from tests.support.transport.scripted import PATIENCE_S, Peer, Stage
from tests.support.transport.scripts import LARGE, push, refuse, refuse_and_read_on, refuse_and_reset, refuse_and_wait

Staging = Callable[..., Stage]


@pytest.mark.parametrize("server", [refuse, refuse_and_reset, refuse_and_read_on, refuse_and_wait])
def test_a_refusal_during_sending_is_the_answer(stage: Staging, client: httpx.Client, server: Callable[[Peer], None]):
    """413 in the middle of 50 MB is a response, not a broken pipe, whatever the server does with the rest."""
    for _ in range(3):
        response = push(client, stage(server).url)
        assert (response.status_code, response.content) == (413, b"too large")


def test_uvicorn_refusing_a_push_is_heard(client: httpx.Client, uvicorn_url: str):
    """An application that answers 401 without reading the body is heard, and the next request works."""
    for _ in range(3):
        response = push(client, f"{uvicorn_url}/refuse")
        assert (response.status_code, response.content) == (401, b"who are you?")
        assert client.post(f"{uvicorn_url}/echo", content=b"next").content == b"next"


def test_a_refusal_is_heard_between_batches(stage: Staging, client: httpx.Client):
    """A body that is made while it is sent is not made further when the server has refused it."""
    refused, made = threading.Event(), []

    def refuse_at_once(peer: Peer) -> None:
        peer.read_head()
        peer.answer(b"too much", "413 Content Too Large", "Connection: close\r\n")
        refused.set()
        peer.over.wait(PATIENCE_S)

    def begin() -> Generator[Batch]:
        for each in (b"a", b"b", b"c"):
            made.append(each)
            yield [each]
            assert refused.wait(PATIENCE_S)

    response = client.send(httpx.Request("POST", stage(refuse_at_once).url, stream=StreamedBody(begin, 3)))
    assert (response.status_code, response.content) == (413, b"too much")
    assert made == [b"a", b"b"]


def test_an_early_success_does_not_stop_the_sending(stage: Staging, client: httpx.Client):
    """An early 200 is no refusal: the rest of the request is sent, and then the answer returned."""
    whole = []

    def early(peer: Peer) -> None:
        head = peer.read_head()
        peer.answer(b"thanks already")
        whole.append(peer.read_body(head))

    server = stage(early)
    assert push(client, server.url).content == b"thanks already"
    server.end()
    assert whole == [LARGE]


def test_interim_answers_are_passed_over(stage: Staging, client: httpx.Client):
    """1xx answers, also while the request is being sent, are not the answer."""

    def patient(peer: Peer) -> None:
        head = peer.read_head()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
        peer.read_body(head)
        peer.send(b"HTTP/1.1 102 Processing\r\n\r\n")
        peer.answer(b"done")

    assert push(client, stage(patient).url).content == b"done"


def test_endless_interim_answers_are_an_error(stage: Staging, client: httpx.Client):
    """A server that only ever says 1xx is not waited for."""

    def forever(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)

    with pytest.raises(httpx.RemoteProtocolError, match="interim"):
        client.post(stage(forever).url)


@pytest.mark.promise(
    "A step never waits for slow readers; a reader that is cut off is never given part of a version for the whole.",
    area="reads",
)
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "without sending a response"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "without sending a response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345", r"received 5 bytes, expected 10 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", r"received 0 bytes, expected 10 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n123", r"received 3 bytes, expected a further"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n123", "complete message body"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n123\r\n", "complete message body"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n123\r\n0\r\n", "complete message body"),
    ],
)
def test_an_answer_that_is_cut_off_is_an_error(stage: Staging, client: httpx.Client, answer: bytes, message: str):
    """An answer that ends early is never a short answer."""

    def cut(peer: Peer) -> None:
        peer.read_request()
        peer.send(answer)

    with pytest.raises(httpx.RemoteProtocolError, match=message) as caught:
        client.post(stage(cut).url)
    assert caught.value.request.method == "POST"


def test_a_reset_during_the_body_is_an_error(stage: Staging, client: httpx.Client):
    """A connection that breaks inside a body is a ReadError that names the request."""
    resettable = threading.Event()

    def break_off(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123")
        assert resettable.wait(PATIENCE_S)
        peer.reset()

    with client.stream("GET", stage(break_off).url) as response:
        chunks = response.iter_raw()
        assert next(chunks) == b"123"
        resettable.set()
        with pytest.raises(httpx.ReadError) as caught:
            next(chunks)
    assert caught.value.request.method == "GET"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "not HTTP/1"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000, "above 65536 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "chunk size"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 70_000, "above 65536 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n123\r\n", "longer than it said"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 1000, "trailers"),
    ],
)
def test_an_answer_that_is_not_http_is_an_error(stage: Staging, client: httpx.Client, answer: bytes, message: str):
    """Nonsense is named, and bounded in size."""

    def nonsense(peer: Peer) -> None:
        peer.read_request()
        peer.send(answer)
        peer.over.wait(PATIENCE_S)

    with pytest.raises(httpx.RemoteProtocolError, match=message):
        client.post(stage(nonsense).url)


def test_a_body_may_end_with_its_connection(stage: Staging, client: httpx.Client):
    """Without a length or chunks the body is everything until the server closes."""

    def old(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.0 200 OK\r\n\r\nall", b" of it" * 50_000)

    assert client.post(stage(old).url).content == b"all" + b" of it" * 50_000


def test_chunks_with_extensions_and_trailers_are_read(stage: Staging, client: httpx.Client):
    """What may stand around chunks is passed over, and the connection is used again."""

    def decorated(peer: Peer) -> None:
        for _ in range(2):
            peer.read_request()
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            peer.send(head, b"3;a=b\r\nabc\r\n", b"0004\r\ndefg\r\n", b"0\r\nTrailer: x\r\nOther: y\r\n\r\n")

    server = stage(decorated)
    for _ in range(2):
        assert client.post(server.url).content == b"abcdefg"


def test_an_answer_in_single_bytes_is_read(stage: Staging, client: httpx.Client):
    """However the answer is cut into packets, it is the same answer."""

    def dribble(peer: Peer) -> None:
        peer.read_request()
        for byte in b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n":
            peer.send(bytes([byte]))

    assert client.post(stage(dribble).url).content == b"abcde"


def test_an_unfinished_request_cannot_be_followed_by_another(stage: Staging):
    """After a refusal during sending a new connection is opened, even if the server would keep the old one."""
    connected_again = threading.Event()

    def keep(peer: Peer) -> None:
        peer.read_head()
        peer.answer(b"no", "403 Forbidden")
        assert connected_again.wait(PATIENCE_S)

    def accept(peer: Peer) -> None:
        peer.read_request()
        peer.answer()

    def dial(origin: Origin, timeout_s: float | None) -> socket.socket:
        if refused:
            connected_again.set()
        return dial_tcp(origin, timeout_s)

    server, refused = stage(keep, accept), False
    with httpx.Client(transport=SocketTransport(dial=dial), timeout=PATIENCE_S) as client:
        refused = push(client, server.url).status_code == 403
        assert client.post(server.url).status_code == 200


def test_a_failing_body_costs_the_connection_only(stage: Staging, client: httpx.Client):
    """An error inside the user's own iterator comes out as it is, and the server never sees a complete request."""
    seen = []

    def note(peer: Peer) -> None:
        peer.read_head()
        seen.append(peer.read_rest())

    def broken() -> Iterator[bytes]:
        yield b"abc"
        raise KeyError("mine")

    server = stage(note)
    with pytest.raises(KeyError, match="mine"):
        client.post(server.url, content=broken())
    server.end()
    assert seen == [b"3\r\nabc\r\n"]
