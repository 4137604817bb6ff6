"""Bodies arrive byte for byte, over a real server, in every shape a body can have."""

import hashlib
from collections.abc import Generator, Iterator

import httpx
import pytest
import torch

from farstep.protocol.memory import tensor_memory
from farstep.transport import Batch, BufferedBody, ResponseBody, SocketTransport, StreamedBody, body_of
from tests.support.transport.bodies import PIECE_LISTS, noise, received


@pytest.mark.parametrize("path", ["/echo", "/chunks"])
@pytest.mark.parametrize("buffers", PIECE_LISTS.values(), ids=PIECE_LISTS.keys())
def test_a_body_comes_back_as_it_was_sent(client: httpx.Client, uvicorn_url: str, buffers: list, path: str):
    """Whatever list of buffers a body is, those bytes arrive there and here, with a known length and in chunks."""
    pieces = BufferedBody(buffers)
    response = client.send(pieces.request(client, "POST", uvicorn_url + path), stream=True)
    body = body_of(response)
    assert isinstance(body, ResponseBody)
    assert body.length == (pieces.nbytes if path == "/echo" else None)
    assert received(response) == b"".join(bytes(each) for each in buffers)
    response.close()


@pytest.mark.parametrize("at_once", [1, 7, 65_536, 10_000_000])
def test_a_body_can_be_read_in_any_steps(client: httpx.Client, uvicorn_url: str, at_once: int):
    """The size of the memory given to `readinto` changes nothing about what is read."""
    data = noise(5_000 if at_once < 100 else 3_000_000)
    for path in ("/echo", "/chunks"):
        with client.stream("POST", uvicorn_url + path, content=data) as response:
            assert received(response, at_once=at_once) == data


def test_a_large_body_arrives_whole(client: httpx.Client, uvicorn_url: str):
    """64 MB in two tensors are the same 64 MB on the other side."""
    tensors = [torch.randint(-(2**62), 2**62, (4_000_000,)) for _ in range(2)]
    pieces = BufferedBody([tensor_memory(each) for each in tensors])
    response = client.send(pieces.request(client, "POST", f"{uvicorn_url}/digest"))
    assert response.text == f"{pieces.nbytes} {hashlib.sha256(b''.join(pieces)).hexdigest()}"


def test_bytes_go_straight_into_a_tensor(client: httpx.Client, uvicorn_url: str):
    """The memory of a tensor can be where a body is received."""
    source, target = torch.randn(500_000), torch.empty(500_000)
    view = tensor_memory(target)
    request = BufferedBody([tensor_memory(source)]).request(client, "POST", f"{uvicorn_url}/echo")
    response = client.send(request, stream=True)
    body = body_of(response)
    while count := body.readinto(view):
        view = view[count:]
    response.close()
    assert torch.equal(source, target)


def test_httpx_reads_bodies_as_it_always_does(client: httpx.Client, uvicorn_url: str):
    """`content`, `iter_bytes` and `read` work over the transport, and `body_of` works after them."""
    data = noise(2_500_000)
    for path in ("/echo", "/chunks"):
        response = client.post(uvicorn_url + path, content=data)
        assert response.content == data
        assert received(response) == data
        with client.stream("POST", uvicorn_url + path, content=data) as response:
            assert b"".join(response.iter_bytes()) == data
        with client.stream("POST", uvicorn_url + path, content=data) as response:
            assert response.read() == data


def test_an_iterator_is_sent_in_chunks(client: httpx.Client, uvicorn_url: str):
    """A generator as httpx content arrives whole, its empty parts and its zeros included."""

    def parts() -> Iterator[bytes]:
        yield from (b"", b"ab", bytes(100_000), b"", b"c")

    assert client.post(f"{uvicorn_url}/echo", content=parts()).content == b"ab" + bytes(100_000) + b"c"


def test_an_iterator_with_a_length_is_sent_with_it(client: httpx.Client, uvicorn_url: str):
    """A Content-Length that the user states is kept, if it is true."""
    headers = {"Content-Length": "4"}
    assert client.post(f"{uvicorn_url}/echo", content=iter([b"ab", b"cd"]), headers=headers).content == b"abcd"
    for parts in ([b"ab"], [b"ab", b"cde"]):
        with pytest.raises(httpx.LocalProtocolError, match="Content-Length says 4"):
            client.post(f"{uvicorn_url}/echo", content=iter(parts), headers=headers)


def test_answers_without_a_body(client: httpx.Client, uvicorn_url: str):
    """204 and the answer to HEAD end with their heads, and the connection goes on."""
    for _ in range(3):
        assert client.get(f"{uvicorn_url}/nothing").content == b""
        head = client.head(f"{uvicorn_url}/headers")
        assert head.content == b""
        assert int(head.headers["Content-Length"]) > 0
    assert client.get(f"{uvicorn_url}/headers").status_code == 200


def test_the_server_sees_the_users_headers(client: httpx.Client, uvicorn_url: str):
    """Authorization and other headers arrive, and no compression is asked for."""
    client.headers["X-Own"] = "1"
    lines = client.get(f"{uvicorn_url}/headers", auth=("me", "secret")).text.split("\n")
    assert "x-own: 1" in lines
    assert "authorization: Basic bWU6c2VjcmV0" in lines
    assert "accept-encoding: identity" in lines
    assert f"host: {httpx.URL(uvicorn_url).netloc.decode()}" in lines


def test_responses_look_like_those_of_httpx(client: httpx.Client, uvicorn_url: str):
    """Status, reason, version and headers equal those that httpx's own transport gives."""
    with httpx.Client() as ordinary:
        expected, actual = (each.post(f"{uvicorn_url}/echo", content=b"x") for each in (ordinary, client))
    assert (actual.status_code, actual.reason_phrase, actual.http_version) == (
        expected.status_code,
        expected.reason_phrase,
        expected.http_version,
    )
    assert set(actual.headers) == set(expected.headers)


def test_pieces_travel_over_other_transports(uvicorn_url: str):
    """Over httpx's own transport and over a mock a body arrives as well, and `body_of` reads the answer."""
    buffers: list[bytes | memoryview] = [b"", memoryview(bytes(3_000_000)), b"abc"]
    for transport in (
        httpx.HTTPTransport(),
        httpx.MockTransport(lambda asked: httpx.Response(200, content=asked.read())),
    ):
        with httpx.Client(transport=transport, timeout=20) as client:
            for path in ("/echo", "/chunks"):
                request = BufferedBody(buffers).request(client, "POST", uvicorn_url + path)
                response = client.send(request, stream=True)
                assert received(response, at_once=65_537) == bytes(3_000_000) + b"abc"
                response.close()


def test_a_body_is_made_while_it_is_sent(client: httpx.Client, uvicorn_url: str):
    """A batch is asked for when the one before it is gone, so that all can be made in the same memory."""
    parts = [noise(each, each) for each in (3, 2_000_000, 1, 700_000)]
    memory = bytearray(max(map(len, parts)))

    def begin() -> Generator[Batch]:
        yield []
        for part in parts:
            memory[: len(part)] = part
            yield [memoryview(memory)[: len(part)]]

    supply = StreamedBody(begin, sum(map(len, parts)))
    request = httpx.Request("POST", f"{uvicorn_url}/echo", stream=supply)
    for _ in range(2):
        assert client.send(request).content == b"".join(parts)


def test_a_body_of_nothing_is_made(client: httpx.Client, uvicorn_url: str):
    """A body without batches is empty, and its request is sent."""

    def begin() -> Generator[Batch]:
        yield from ()

    request = httpx.Request("POST", f"{uvicorn_url}/echo", stream=StreamedBody(begin, 0))
    assert client.send(request).content == b""


def test_an_error_in_making_a_body_ends_the_request(client: httpx.Client, uvicorn_url: str):
    """What goes wrong while a body is made reaches the caller as it is, and the next request has a new connection."""

    def begin() -> Generator[Batch]:
        yield [bytes(100_000)]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.send(httpx.Request("POST", f"{uvicorn_url}/echo", stream=StreamedBody(begin, 100_001)))
    assert client.post(f"{uvicorn_url}/echo", content=b"next").content == b"next"


def test_a_mock_that_streams_can_be_read_into(client: httpx.Client):
    """`body_of` keeps what did not fit of the chunks that another transport yields."""
    mock = httpx.MockTransport(lambda _: httpx.Response(200, content=iter([b"", b"abc", b"", b"defgh"])))
    with httpx.Client(transport=mock) as mocked, mocked.stream("GET", "http://127.0.0.1/") as response:
        assert received(response, at_once=2) == b"abcdefgh"


def test_a_request_without_its_length_is_still_framed(uvicorn_url: str, transport: SocketTransport):
    """A request built by hand around BufferedBody needs no Content-Length: the transport knows it."""
    request = httpx.Request("POST", f"{uvicorn_url}/echo", stream=BufferedBody([b"abc"]))
    response = transport.handle_request(request)
    assert response.read() == b"abc"


def test_an_unread_body_may_be_left(client: httpx.Client, uvicorn_url: str):
    """Closing a response in the middle of its body costs the connection and nothing else."""
    with client.stream("POST", f"{uvicorn_url}/echo", content=bytes(5_000_000)) as response:
        assert body_of(response).readinto(memoryview(bytearray(10))) == 10
    with pytest.raises(httpx.StreamClosed):
        body_of(response).readinto(memoryview(bytearray(10)))
    assert client.post(f"{uvicorn_url}/echo", content=b"next").content == b"next"
