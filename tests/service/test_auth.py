"""Nobody without a token gets anywhere: every route, every method, every way of spelling them."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from fastapi import FastAPI
from starlette.types import ASGIApp, Message

import farstep_service.routes.auth
from farstep_service.app import create_app
from farstep_service.routes import Edge
from farstep_service.routes.auth import PUBLIC, Tokens
from farstep_service.settings import Settings
from tests.support.service.answers import MSGPACK, half_sent, opened, read_answer
from tests.support.service.raw import RawClient, session_document
from tests.support.service.servers import TOKEN, RunningServer, running_server

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "FARSTEP")
SECOND = "fedcba9876543210fedcba9876543210"
WRONG: tuple[Mapping[str, str], ...] = (
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer "},
    {"authorization": f"Bearer {TOKEN[:-1]}"},
    {"authorization": f"Bearer {TOKEN}x"},
    {"authorization": f"Bearer {TOKEN[:-1]}X"},
    {"authorization": f"Bearer {TOKEN},{TOKEN}"},
    {"authorization": f"Bearer {TOKEN} {TOKEN}"},
    {"authorization": f"Basic {TOKEN}"},
    {"authorization": TOKEN},
    {"authorization": f"Token {TOKEN}"},
    {"authorization": f"Bearer\t{TOKEN}"},
    {"x-authorization": f"Bearer {TOKEN}"},
    {"proxy-authorization": f"Bearer {TOKEN}"},
    {"cookie": f"token={TOKEN}"},
    {"x-forwarded-for": "127.0.0.1"},
    {"x-original-url": "/healthz"},
)


def in_process(app: ASGIApp, method: str, raw_path: str, headers: list[tuple[bytes, bytes]]) -> tuple[int, list[str]]:
    """Ask the application itself; return the status and the names of what it received of the body.

    A request that names no host names a loopback one.
    """
    if not any(name == b"host" for name, _ in headers):
        headers = [(b"host", b"localhost"), *headers]
    path, _, query = raw_path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("latin-1"),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 7171),
    }
    received: list[str] = []
    sent: list[Message] = []

    async def receive() -> Message:
        received.append("body")
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    async def ask() -> None:
        await app(scope, receive, send)

    asyncio.run(ask())
    return int(sent[0]["status"]), received


@pytest.fixture(scope="module")
def app() -> Edge:
    edge = create_app(Settings(tokens=(TOKEN, SECOND))).app
    assert isinstance(edge, Edge)
    return edge


def inside(app: Any) -> FastAPI:
    """Return the application within its layers."""
    while not isinstance(app, FastAPI):
        app = app.app
    return app


def paths_of(app: Edge) -> list[str]:
    """Return the path of every route there is, with names filled in."""
    found: set[str] = set()

    def walk(routes: Iterable[Any]) -> None:
        for route in routes:
            walk(getattr(route, "routes", None) or ())
            found.add(getattr(route, "path", ""))

    walk(inside(app).routes)
    found |= inside(app).openapi()["paths"].keys()
    return sorted(path.replace("{name}", "s").replace("{worker}", "w0") for path in found if path)


def spellings(path: str) -> list[str]:
    """Return a path as it is, and in ways that a careless check might take for another."""
    return [
        path,
        path + "/",
        "/" + path,
        path + "?x=/healthz",
        path + "?/healthz",
        path + ";/healthz",
        path + "%20",
        path + "%00",
        path.upper(),
        path.replace("/", "//"),
        path.replace("/", "/./"),
        path.replace("/", "%2f"),
        path.replace("h", "%68"),
        "/healthz/.." + path,
        "/healthz/%2e%2e" + path,
        "/healthz" + path,
        "/healthz?" + path,
        path + "/../healthz",
        "http://other" + path,
    ]


@pytest.mark.promise("No route answers without a token, but for `/healthz`.", area="security")
def test_every_route_is_known_to_these_tests(app: Edge) -> None:
    """The list of paths is the router's own, documentation and data routes included."""
    assert set(paths_of(app)) >= {
        "/docs",
        "/openapi.json",
        "/healthz",
        "/v1/info",
        "/v1/sessions",
        "/v1/sessions/s",
        "/v1/sessions/s/push",
        "/v1/sessions/s/contents",
        "/v1/sessions/s/file",
        "/v1/sessions/s/groups",
        "/v1/sessions/s/workers/w0",
    }


@pytest.mark.promise("No route answers without a token, but for `/healthz`.", area="security")
def test_no_route_answers_without_a_token(app: Edge) -> None:
    """Every path in every spelling, with every method: 401, without a byte of the body; only /healthz is public."""
    public = set()
    for path in {spelling for known in paths_of(app) for spelling in spellings(known)}:
        for method in METHODS:
            status, received = in_process(app, method, path, [])
            if status == 401:
                assert received == []
            else:
                public.add((method, path.partition("?")[0]))
    assert public == PUBLIC == {("GET", "/healthz"), ("HEAD", "/healthz")}


@pytest.mark.parametrize("headers", WRONG, ids=lambda headers: str(headers).replace(TOKEN, "T"))
def test_nothing_but_the_token_opens(app: Edge, headers: Mapping[str, str]) -> None:
    """Other tokens, other schemes, other headers and other places for the token are no token."""
    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert in_process(app, "GET", "/v1/info", given)[0] == 401
    assert in_process(app, "POST", "/v1/sessions/s/push", given) == (401, [])


@pytest.mark.parametrize(
    "host", ["/healthz", "healthz", "a/healthz?", "localhost/healthz#", "", "127.0.0.1:7171/../healthz"]
)
def test_the_host_header_does_not_matter(app: Edge, host: str) -> None:
    """A Host header that spells a public path opens nothing."""
    assert in_process(app, "GET", "/v1/info", [(b"host", host.encode())]) == (401, [])


def test_two_authorization_headers_are_none(app: Edge) -> None:
    """Which of two would count is not guessed, not even if both are right."""
    right, wrong = (b"authorization", f"Bearer {TOKEN}".encode()), (b"authorization", b"Bearer x")
    for pair in ([right, wrong], [wrong, right], [right, right]):
        assert in_process(app, "GET", "/v1/info", pair)[0] == 401
    assert in_process(app, "GET", "/v1/info", [right])[0] == 200


@pytest.mark.parametrize("token", [TOKEN, SECOND])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_every_accepted_token_opens_every_route(app: Edge, token: str, scheme: str) -> None:
    """Several tokens are valid at once, so that one can be replaced; the scheme is compared without case."""
    given = [(b"authorization", f"{scheme} {token}".encode())]
    for path in paths_of(app):
        assert in_process(app, "GET", path, given)[0] != 401


def test_without_tokens_nobody_has_to_show_one() -> None:
    """A server on loopback without a token lets everyone in, also those who show one."""
    app = create_app(Settings())
    assert in_process(app, "GET", "/v1/info", [])[0] == 200
    assert in_process(app, "GET", "/v1/info", [(b"authorization", b"Bearer anything")])[0] == 200


def test_another_protocol_than_http_is_not_let_in(app: Edge) -> None:
    """A websocket, which no route here speaks, is checked like anything else."""
    sent: list[Message] = []

    async def ask() -> None:
        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/v1/info", "raw_path": b"/v1/info", "headers": [], "query_string": b""}
        await app({**scope, "subprotocols": []}, receive, send)

    asyncio.run(ask())
    assert [message["type"] for message in sent] == ["websocket.close"]


# -- a real server


@pytest.fixture(scope="module")
def guarded() -> Iterator[RunningServer]:
    with running_server("--log-level", "debug", token=TOKEN, loaded=True) as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/sessions/s/push"),
        ("PUT", "/v1/sessions/s/contents"),
        ("POST", "/v1/sessions/s/groups"),
        ("POST", "/v1/sessions"),
        ("PUT", "/nowhere"),
    ],
)
def test_the_answer_comes_before_the_body(guarded: RunningServer, method: str, path: str) -> None:
    """A request that announces a terabyte and shows no token is refused on its headers, at once."""
    began = time.perf_counter()
    with half_sent(guarded.url, method, path, {"Content-Type": MSGPACK, "Content-Length": str(2**40)}) as sock:
        answer = read_answer(sock)
    assert (answer.status, answer.code) == (401, "unauthorized")
    assert time.perf_counter() - began < 1.0


def test_nobody_is_asked_to_go_on_before_he_has_shown_a_token(guarded: RunningServer) -> None:
    """To `Expect: 100-continue` the answer is 401, not 100."""
    headers = {"Content-Type": MSGPACK, "Content-Length": "1000000", "Expect": "100-continue"}
    with half_sent(guarded.url, "POST", "/v1/sessions/s/push", headers) as sock:
        assert read_answer(sock).status == 401


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.1/healthz/../v1/info", "/healthz/../v1/info", "//healthz", "/healthz%2f..%2fv1%2finfo", "*"],
)
def test_targets_as_they_stand_on_the_line(guarded: RunningServer, target: str) -> None:
    """Absolute, doubled and dotted request targets are no way around."""
    with opened(guarded.url) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert read_answer(sock).status in (400, 401)


def test_health_is_public(guarded: RunningServer) -> None:
    """Whoever watches the server needs no token, and learns nothing but that it answers."""
    with RawClient(guarded.url) as raw:
        assert raw.request("GET", "/healthz").document == {"status": "ok"}
        head = raw.request("HEAD", "/healthz")
        assert (head.status, head.body) == (200, b"")


@pytest.mark.promise(
    "A token stands in no log, no error and no document, and is compared in constant time.",
    area="security",
)
def test_the_token_is_never_written_down(guarded: RunningServer) -> None:
    """After good, bad and broken requests the token stands in no log, no error, no document."""
    said: list[bytes] = []
    with RawClient(guarded.url, TOKEN) as raw, RawClient(guarded.url, TOKEN + "x") as stranger:
        (worker,) = raw.begun("s")
        said.append(worker.push([torch.full((4,), float("nan"))]).body)
        said.append(worker.push([torch.ones(4)]).body)
        for path in ("/openapi.json", "/docs", "/v1/info", "/v1/sessions", "/v1/sessions/s", "/nowhere"):
            said.append(raw.request("GET", path).body)
            said.append(stranger.request("GET", path).body)
        said.append(raw.request("GET", f"/v1/sessions/{TOKEN[:8]}").body)
        said.append(raw.json("POST", "/v1/sessions", session_document("s", "w1", nonfinite="maybe")).body)
        headers = {"Content-Type": MSGPACK, "Content-Length": "100", "Authorization": f"Bearer {TOKEN}"}
        with half_sent(guarded.url, "POST", "/v1/sessions/s/push", headers, [b"\x80"]):
            pass
        assert raw.request("GET", "/v1/info").document["authentication"] is True
    assert not any(TOKEN.encode() in each for each in said)
    assert json.loads(said[2])["info"]["title"] == "farstep"
    assert TOKEN not in guarded.log
    assert TOKEN not in str(guarded.said)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"/v1/sessions/{TOKEN}"),
        ("GET", f"/v1/sessions/{TOKEN}/contents"),
        ("GET", f"/v1/sessions/s/contents?fields={TOKEN}"),
        ("GET", f"/v1/sessions/s/contents?{TOKEN}=1"),
        ("DELETE", f"/v1/sessions/{TOKEN}"),
        ("GET", f"/{TOKEN}"),
        ("PATCH", f"/v1/sessions/{TOKEN}/groups"),
    ],
)
def test_a_token_in_the_wrong_place_is_not_repeated(guarded: RunningServer, method: str, path: str) -> None:
    """An error about a path or a document with a token in it, accepted or merely shown, has asterisks in its place."""
    other = "another-secret.of~somebody"
    with RawClient(guarded.url, TOKEN) as raw, RawClient(guarded.url, other) as stranger:
        for body in ({"groups": {"0": {TOKEN: 1}}}, {TOKEN: 1}):
            answer = raw.json(method, path, body)
            assert answer.status >= 400
            assert TOKEN not in answer.body.decode()
            assert answer.document["code"]
        assert other not in stranger.request(method, path.replace(TOKEN, other)).body.decode()
    with half_sent(guarded.url, "PUT", f"/v1/sessions/{TOKEN}/file", {"Authorization": f"Bearer {TOKEN}"}):
        pass
    assert TOKEN not in guarded.log
    assert other not in guarded.log


def test_what_a_request_shows_is_masked_without_tokens_too(server: RunningServer) -> None:
    """A server that asks for no token does not repeat the one that a client has for another server."""
    with RawClient(server.url, TOKEN) as raw:
        answer = raw.request("GET", f"/v1/sessions/{TOKEN}")
    assert answer.code == "unknown_session"
    assert "*" * len(TOKEN) in answer.document["detail"]


# -- how it is done


@pytest.mark.promise(
    "A token stands in no log, no error and no document, and is compared in constant time.",
    area="security",
)
def test_secrets_are_compared_in_constant_time() -> None:
    """The module that knows tokens compares digests with hmac.compare_digest, all of them, and nothing with `==`."""
    source = inspect.getsource(farstep_service.routes.auth)
    tree = ast.parse(source)
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert calls.count("hmac.compare_digest") == 1
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Eq, ast.NotEq)) for op in node.ops):
            names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            assert not names & {"digest", "each", "token", "tokens", "credential", "known"}, ast.unparse(node)
        assert not isinstance(node, ast.Break), "the loop over digests must not end early"


def test_tokens_are_kept_as_digests() -> None:
    """No attribute of what checks tokens holds one."""
    tokens = Tokens([TOKEN])
    assert TOKEN not in repr(vars(tokens))
    assert TOKEN.encode() not in b"".join(vars(tokens)["_digests"])
