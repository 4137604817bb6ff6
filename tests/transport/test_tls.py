"""The same over TLS: certificates are checked as the user configures it, and no byte is lost."""

import gc
import select
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import closing

import httpx
import pytest
import trustme

from farstep.transport import BufferedBody, SocketTransport, body_of
from farstep.transport.pool import Origin
from tests.support.transport.bodies import PIECE_LISTS, noise, received
from tests.support.transport.scripted import PATIENCE_S, Peer, Stage
from tests.support.transport.scripts import push, refuse, refuse_and_read_on
from tests.support.transport.wellbehaved import running

Staging = Callable[..., Stage]


@pytest.fixture(scope="module")
def secure_url(certificate: trustme.LeafCert) -> Iterator[str]:
    with running(certificate) as url:
        yield url


@pytest.fixture
def secure_client(trusting: ssl.SSLContext) -> Iterator[httpx.Client]:
    with httpx.Client(transport=SocketTransport(verify=trusting), timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def serving(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.mark.parametrize("buffers", PIECE_LISTS.values(), ids=PIECE_LISTS.keys())
def test_a_body_comes_back_over_tls(secure_client: httpx.Client, secure_url: str, buffers: list):
    """Whatever list of buffers a body is, TLS carries those bytes, and the connection is used again."""
    for path in ("/echo", "/chunks"):
        request = BufferedBody(buffers).request(secure_client, "POST", secure_url + path)
        response = secure_client.send(request, stream=True)
        assert received(response) == b"".join(bytes(each) for each in buffers)
        response.close()


def test_a_large_body_crosses_tls(secure_client: httpx.Client, secure_url: str):
    """20 MB there and back in odd pieces are the same 20 MB."""
    data = [noise(each, each) for each in (16_383, 16_384, 16_385, 1, 10_000_000, 10_000_001)]
    response = secure_client.send(BufferedBody(data).request(secure_client, "POST", f"{secure_url}/echo"))
    assert response.content == b"".join(data)


def test_an_unknown_authority_is_refused(secure_url: str):
    """By default a certificate that no known authority signed is a ConnectError, and nothing is sent."""
    with (
        httpx.Client(transport=SocketTransport()) as client,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY"),
    ):
        client.get(f"{secure_url}/headers")


def test_checking_can_be_turned_off(secure_url: str):
    """`verify=False` means what it means in httpx."""
    with httpx.Client(transport=SocketTransport(verify=False)) as client:
        assert client.get(f"{secure_url}/headers").status_code == 200


def test_a_certificate_for_another_name_is_refused(authority: trustme.CA, trusting: ssl.SSLContext):
    """The certificate has to name the host of the URL, or the one that `sni_hostname` says."""
    with (
        running(authority.issue_cert("other.invalid")) as url,
        httpx.Client(transport=SocketTransport(verify=trusting)) as client,
    ):
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY"):
            client.get(f"{url}/headers")
        response = client.get(f"{url}/headers", extensions={"sni_hostname": "other.invalid"})
        assert response.status_code == 200


def test_plain_http_on_a_tls_port_is_an_error(uvicorn_url: str, trusting: ssl.SSLContext):
    """A server that does not speak TLS is a ConnectError."""
    with httpx.Client(transport=SocketTransport(verify=trusting)) as client, pytest.raises(httpx.ConnectError):
        client.get(uvicorn_url.replace("http:", "https:"))


@pytest.mark.parametrize("server", [refuse, refuse_and_read_on])
def test_a_refusal_during_sending_is_heard_over_tls(
    stage: Staging, secure_client: httpx.Client, serving: ssl.SSLContext, server: Callable[[Peer], None]
):
    """413 in the middle of 50 MB is a response over TLS too."""
    response = push(secure_client, stage(server, context=serving).url)
    assert (response.status_code, response.content) == (413, b"too large")


def test_a_missing_farewell_is_a_cut_off_body(stage: Staging, secure_client: httpx.Client, serving: ssl.SSLContext):
    """A body that ends with its connection must end as TLS says; anybody can cut a connection."""

    def cut(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\nhalf of")
        peer.sock.shutdown(2)  # ends TCP without TLS's own goodbye

    with pytest.raises(httpx.ReadError):
        secure_client.post(stage(cut, context=serving).url)


def test_silence_over_tls_is_a_read_timeout(stage: Staging, secure_client: httpx.Client, serving: ssl.SSLContext):
    """A server that stops inside a body over TLS is given up after the read timeout."""

    def half(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123")
        peer.over.wait(PATIENCE_S)

    url = stage(half, context=serving).url
    with secure_client.stream("GET", url, timeout=httpx.Timeout(PATIENCE_S, read=0.15)) as response:
        body, view = body_of(response), memoryview(bytearray(10))
        assert body.readinto(view) == 3
        with pytest.raises(httpx.ReadTimeout):
            body.readinto(view)


def test_a_harmless_request_is_sent_again_over_tls(
    stage: Staging, secure_client: httpx.Client, serving: ssl.SSLContext
):
    """A kept TLS connection that the server ends is replaced for a request that may be repeated."""

    def hang_up(peer: Peer) -> None:
        peer.read_request()
        peer.answer()
        peer.read_head()

    def answer(peer: Peer) -> None:
        peer.read_request()
        peer.answer(b"second")

    server = stage(hang_up, answer, context=serving)
    secure_client.get(server.url)
    assert secure_client.get(server.url).content == b"second"


def test_a_server_that_is_gone_before_it_is_greeted_leaves_no_socket_open() -> None:
    """Whoever asks whether a plain address speaks TLS just as the server dies is told no, and nothing stays open."""
    dialled: list[socket.socket] = []

    def dial(_: Origin, within_s: float | None) -> socket.socket:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sock = socket.create_connection(listener.getsockname(), within_s)
            theirs, _ = listener.accept()
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it resets
            theirs.close()
        assert select.select([sock], [], [], PATIENCE_S)[0]
        dialled.append(sock)
        return sock

    with closing(SocketTransport(dial=dial)) as transport:
        assert not transport.speaks_tls(httpx.URL("http://127.0.0.1:9"), PATIENCE_S)
    gc.collect()  # where a socket that is still open would be warned about
    assert [each.fileno() for each in dialled] == [-1]
