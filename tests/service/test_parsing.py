"""Requests that ask for another protocol than HTTP/1.1: they are answered as if they had not asked, body and all."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httptools
import pytest
import torch

from farstep.protocol import encode
from farstep_service.server.parsing import Parser, authority_of
from tests.support.service.answers import MSGPACK, opened, read_answer
from tests.support.service.echoing import Echo, echo, serving
from tests.support.service.raw import RawClient, session_document
from tests.support.service.servers import RunningServer

ASKING = {
    "h2c": "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
    "kept": "Connection: keep-alive, upgrade\r\nUpgrade: h2c\r\n",
    "last": "Connection: close\r\nconnection: Upgrade\r\nUpgrade: TLS/1.2, h2c\r\n",
    "websocket": "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n",
}
PAYLOAD = bytes(range(256)) * 2048
PARAMETER = torch.ones(200_000)


class Heard:
    """Requests as a listener hears them: their heads, and what came as their bodies."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.begun: list[tuple[bytes, bytes]] = []
        self.requests: list[tuple[bytes, dict[bytes, bytes], bytes]] = []

    def on_message_begin(self) -> None:
        self.url, self.headers, self.body = b"", [], b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.begun.append((self.url, dict(self.headers).get(b"host", b"")))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.requests.append((self.url, dict(self.headers), self.body))


def asking(head: bytes, how: str) -> bytes:
    """Return a request with further lines in its head."""
    line, _, rest = head.partition(b"\r\n")
    return line + b"\r\n" + ASKING[how].encode() + rest


@pytest.mark.parametrize("how", ASKING)
@pytest.mark.parametrize("piece", [1, 7, 150, 4096])
def test_each_request_is_begun_once_and_has_its_body(how: str, piece: int) -> None:
    """However the bytes are cut, a body with a length, one in chunks and none are read, and so is the next request."""
    bodies = [b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"\r\n"]
    sent = [asking(b"POST /%d HTTP/1.1\r\nHost: x\r\n" % number, how) + body for number, body in enumerate(bodies)]
    wanted = [b"hello", b"hello", b""]
    if how == "last":
        sent, wanted = sent[:1], wanted[:1]
    else:
        sent.append(b"GET /3 HTTP/1.1\r\nHost: y\r\n\r\n")
        wanted.append(b"")
    heard, data = Heard(), b"".join(sent)
    parser = Parser(heard)
    for at in range(0, len(data), piece):
        parser.feed_data(data[at : at + piece])
    assert [body for _, _, body in heard.requests] == wanted
    assert [url for url, _ in heard.begun] == [b"/%d" % number for number in range(len(sent))]
    assert not any(b"upgrade" in headers for _, headers, _ in heard.requests)


def test_a_request_that_is_not_kept_stays_so() -> None:
    """`Connection: close` beside `Upgrade` still ends the connection, and what follows is not parsed."""
    kept: list[bool] = []

    class Asking(Heard):
        def on_headers_complete(self) -> None:
            kept.append(parser.should_keep_alive())

    parser = Parser(Asking())
    parser.feed_data(asking(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "last") + b"GET /more HTTP/1.1\r\n\r\n")
    assert kept == [False]


def test_a_tunnel_is_not_http_behind_its_head() -> None:
    """After CONNECT no byte is taken for a body or a request."""
    heard = Heard()
    with pytest.raises(httptools.HttpParserUpgrade):
        Parser(heard).feed_data(
            b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\n\r\n"
        )
    assert [body for _, _, body in heard.requests] == [b""]


@pytest.mark.parametrize(
    ("target", "authority"),
    [
        (b"/v1/info", b""),
        (b"/v1?to=http://evil/", b""),
        (b"//evil/", b""),
        (b"*", b""),
        (b"http://evil", b"evil"),
        (b"http://evil:80/v1/info", b"evil:80"),
        (b"HTTP://[::1]:7171?x", b"[::1]:7171"),
        (b"http://evil#@localhost/", b"evil"),
    ],
)
def test_a_target_that_names_a_host_stands_above_the_header(target: bytes, authority: bytes) -> None:
    """Of `GET http://evil/ HTTP/1.1` with `Host: localhost` the host is evil, as RFC 9112 has it."""
    assert authority_of(target) == authority
    heard = Heard()
    if b"#" not in target:  # which the parser refuses before
        Parser(heard).feed_data(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % target)
        assert heard.begun == [(target, authority or b"localhost")]


# -- a real server


@pytest.mark.parametrize("how", [each for each in ASKING if each != "last"])
def test_a_body_goes_into_memory_all_the_same(how: str) -> None:
    """Small and large messages that ask for another protocol come back whole, one after the other on a connection."""
    with serving(Echo()) as connect:
        sock = connect()
        for payload in (b"", b"small", PAYLOAD, b"again"):
            sock.sendall(asking(echo(payload), how))
            assert read_answer(sock).payload == payload
        sock.sendall(echo(PAYLOAD))
        assert read_answer(sock).payload == PAYLOAD


@pytest.mark.parametrize("how", ASKING)
def test_a_document_is_read_all_the_same(server: RunningServer, how: str) -> None:
    """A session is created by a request that asks for another protocol."""
    body = json.dumps(session_document(f"asked-{how}", "w0")).encode()
    head = f"POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with opened(server.url) as sock:
        sock.sendall(asking(f"{head}Content-Type: application/json\r\n\r\n".encode() + body, how))
        assert read_answer(sock).document["created"] is True


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_may_ask_for_http2(server: RunningServer, raw: RawClient, tmp_path: Path) -> None:
    """`curl --http2` creates a session and pushes gradients to it over HTTP/1.1."""
    (tmp_path / "session.json").write_text(json.dumps(session_document("curl", "w0")))

    def curl(method: str, path: str, kind: str, file: Path) -> Any:
        done = subprocess.run(
            [
                *("curl", "-sS", "--http2", "--noproxy", "*", "-w", "\n%{http_version} %{http_code}"),
                *("-X", method, "-H", f"content-type: {kind}", "--data-binary", f"@{file}", server.url + path),
            ],
            capture_output=True,
            check=True,
            timeout=60,
        )
        body, _, last = done.stdout.rpartition(b"\n")
        assert last == b"1.1 200", body
        return body

    created = curl("POST", "/v1/sessions", "application/json", tmp_path / "session.json")
    assert json.loads(created)["created"] is True
    (worker,) = raw.begun("curled", parameters=[PARAMETER])
    header, payload = worker.message([PARAMETER])
    (tmp_path / "push").write_bytes(b"".join(encode(header, payload)))
    curl("POST", "/v1/sessions/curled/push", MSGPACK, tmp_path / "push")
    assert worker.version == 1
