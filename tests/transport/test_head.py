"""Heads are written and read as RFC 9112 says, and what it calls an error is one."""

import http.client
import io

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farstep.transport.head import MAX_HEADERS, chunk_size, request_head, response_head

NAMES = st.text("abcXYZ-_09!~", min_size=1, max_size=12).filter(
    lambda name: name.lower() not in ("content-length", "transfer-encoding", "connection")
)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30).map(str.strip)


class Canned:
    """What http.client needs of a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


@given(
    status=st.sampled_from([200, 204, 304, 400, 503]),
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=8),
    length=st.none() | st.integers(0, 10**12),
    method=st.sampled_from(["GET", "POST", "HEAD"]),
)
def test_well_formed_heads_mean_what_the_standard_library_says(
    status: int, headers: list[tuple[str, str]], length: int | None, method: str
):
    """Status, headers and length of a well-formed head are those that `http.client` finds."""
    lines = [f"HTTP/1.1 {status} Some reason", *(f"{name}: {value}" for name, value in headers)]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    block = "\r\n".join(lines).encode()
    known = http.client.HTTPResponse(Canned(block + b"\r\n\r\n"), method=method)  # type: ignore[arg-type]
    known.begin()
    head = response_head(block, method)
    assert (head.status, head.reason, head.version) == (known.status, b"Some reason", b"HTTP/1.1")
    assert [(name.decode(), value.decode()) for name, value in head.headers] == known.getheaders()
    assert head.length == known.length
    assert head.reusable is (not known.will_close)
    known.close()


@pytest.mark.parametrize(
    ("lines", "length", "chunked", "reusable"),
    [
        (["HTTP/1.1 200 OK", "Content-Length: 5"], 5, False, True),
        (["HTTP/1.1 200", "content-length:\t 5 \t"], 5, False, True),
        (["HTTP/1.1 200 OK", "Content-Length: 5", "Content-Length: 5"], 5, False, True),
        (["HTTP/1.1 200 OK", "Content-Length: 5, 5"], 5, False, True),
        (["HTTP/1.1 200 OK", "Content-Length: 5", "Connection: foo, Close"], 5, False, False),
        (["HTTP/1.1 200 OK", "Transfer-Encoding: Chunked"], None, True, True),
        (["HTTP/1.1 200 OK", "Transfer-Encoding: chunked", "Content-Length: 5"], None, True, False),
        (["HTTP/1.1 200 OK"], None, False, False),
        (["HTTP/1.0 200 OK", "Content-Length: 5"], 5, False, False),
        (["HTTP/1.1 204 No Content", "Content-Length: 5"], 0, False, True),
        (["HTTP/1.1 304 Not Modified", "Content-Length: 5"], 0, False, True),
    ],
)
def test_a_head_tells_where_the_body_ends(lines: list[str], length: int | None, chunked: bool, reusable: bool):
    """Length, chunks and the connection's future follow RFC 9112 section 6.3."""
    head = response_head("\r\n".join(lines).encode(), "POST")
    assert (head.length, head.chunked, head.reusable) == (length, chunked, reusable)


def test_an_answer_to_head_has_no_body():
    """The answer to HEAD states a length and sends nothing."""
    assert response_head(b"HTTP/1.1 200 OK\r\nContent-Length: 5", "HEAD").length == 0


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"HTTP/2 200 OK",
        b"HTTP/1.1 abc",
        b"HTTP/1.1 99 Low",
        b"HTTP/1.1  200 OK",
        b"SSH-2.0-OpenSSH_9.6",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0",
        b"HTTP/1.1 200 OK\r\nContent-Length: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 30,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked",
        b"HTTP/1.1 200 OK\r\nX-Folded: a\r\n  b",
        b"HTTP/1.1 200 OK\r\nNo colon",
        b"HTTP/1.1 200 OK\r\nSpace before : x",
        b"HTTP/1.1 200 OK\r\n: no name",
        b"HTTP/1.1 200 OK\r\nBare: line\nfeed",
        b"HTTP/1.1 200 OK\r\nNul: \0",
        b"HTTP/1.1 200 OK" + b"\r\nA: b" * (MAX_HEADERS + 1),
    ],
)
def test_a_malformed_head_is_refused(block: bytes):
    """A head that two readers could understand differently is an error, never a guess."""
    with pytest.raises(httpx.RemoteProtocolError):
        response_head(block, "POST")


@pytest.mark.parametrize(("line", "size"), [(b"0", 0), (b"ff", 255), (b"FF ; name=value", 255), (b"00010", 16)])
def test_a_chunk_states_its_size(line: bytes, size: int):
    """A chunk's first line is a hexadecimal number; what follows a semicolon is passed over."""
    assert chunk_size(line) == size


@pytest.mark.parametrize("line", [b"", b"-1", b"0x10", b"1_0", b"+1", b"g", b"1" * 16, b"\xff"])
def test_a_malformed_chunk_is_refused(line: bytes):
    """A chunk whose size is not a plain hexadecimal number is an error."""
    with pytest.raises(httpx.RemoteProtocolError):
        chunk_size(line)


def test_a_request_head_is_what_http_says():
    """The request line, the user's headers in their order, and one framing header."""
    request = httpx.Request("POST", "http://127.0.0.1:80/a%20b?c=d", headers={"X-One": "1"}, content=b"abc")
    assert request_head(request, 3).decode().split("\r\n") == [
        "POST /a%20b?c=d HTTP/1.1",
        "Host: 127.0.0.1",
        "X-One: 1",
        "Accept-Encoding: identity",
        "Content-Length: 3",
        "",
        "",
    ]


@pytest.mark.parametrize(
    ("method", "nbytes", "line"),
    [
        ("POST", 0, "Content-Length: 0"),
        ("PUT", 0, "Content-Length: 0"),
        ("GET", 5, "Content-Length: 5"),
        ("POST", None, "Transfer-Encoding: chunked"),
    ],
)
def test_a_body_is_announced(method: str, nbytes: int | None, line: str):
    """The transport's own knowledge of the body frames it, whatever headers the request came with."""
    request = httpx.Request(method, "http://127.0.0.1/", headers={"Content-Length": "7", "Transfer-Encoding": "x"})
    head = request_head(request, nbytes).decode()
    assert line in head.split("\r\n")
    assert head.lower().count("content-length") + head.lower().count("transfer-encoding") == 1


def test_a_get_announces_no_body():
    """A GET without a body has no framing header."""
    head = request_head(httpx.Request("GET", "http://127.0.0.1/"), 0).lower()
    assert b"content-length" not in head
    assert b"transfer-encoding" not in head


def test_compression_is_asked_for_only_by_the_user():
    """The Accept-Encoding that httpx adds becomes identity; one that the user chose stays."""
    with httpx.Client() as client:
        assert b"\r\nAccept-Encoding: identity\r\n" in request_head(client.build_request("GET", "http://127.0.0.1/"), 0)
        chosen = client.build_request("GET", "http://127.0.0.1/", headers={"accept-encoding": "zstd"})
    assert b"\r\nAccept-Encoding: zstd\r\n" in request_head(chosen, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X", "a\r\nEvil: 1"),
        ("X", "a\nEvil: 1"),
        ("X", "a\rEvil: 1"),
        ("X", "a\0"),
        ("X\r\nEvil", "1"),
        ("X Y", "1"),
        ("X:", "1"),
        ("", "1"),
    ],
)
def test_a_header_cannot_smuggle_another(name: str, value: str):
    """A header with a line break or a strange name is refused before anything is sent."""
    request = httpx.Request("GET", "http://127.0.0.1/", headers=[(name, value)])
    with pytest.raises(httpx.LocalProtocolError):
        request_head(request, 0)


def test_a_method_cannot_smuggle_a_header():
    """A method that holds a space or a line break is refused."""
    for method in ("GET /other", "GET\r\nEvil:1"):
        with pytest.raises(httpx.LocalProtocolError):
            request_head(httpx.Request(method, "http://127.0.0.1/"), 0)
