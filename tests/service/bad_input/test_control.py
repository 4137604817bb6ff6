"""Bad input on the control routes: bodies, options, epochs, names, paths and methods."""

from __future__ import annotations

import json

import pytest

from tests.support.service.answers import half_sent, read_answer
from tests.support.service.bad_input.refusing import JSON, refused_as
from tests.support.service.raw import RawClient, session_document
from tests.support.service.servers import RunningServer

pytestmark = pytest.mark.usefixtures("unchanged")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"1",
        b'"text"',
        b"{}",
        b"\xff\xfe\x00",
        b'{"name": NaN}',
        b'{"name": "s", "name": "t"}',
        b"[" * 1_000,
        b"[" * 200_000,
        b'{"groups":' * 100_000,
        b'{"name": ' + b"9" * 10_000 + b"}",
        b'{"segments": [' + b"{}," * 90_000 + b"{}]}",
        b"{" + b",".join(b'"x%d":1' % index for index in range(90_000)) + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/sessions"), ("PATCH", "/v1/sessions/standing/groups")])
def test_a_body_that_is_no_document_is_refused(raw: RawClient, method: str, path: str, body: bytes) -> None:
    """No JSON, other JSON, deep JSON and JSON of many mistakes are all refused in a short answer."""
    refused_as(lambda: raw.request(method, path, body, JSON), "invalid_request")


@pytest.mark.promise(
    "Documents, sessions and parameters have stated limits, and a refusal names the one that was passed.",
    area="limits",
)
def test_a_document_that_is_too_large_is_refused(server: RunningServer, raw: RawClient) -> None:
    """A document has 32 MiB at most: one that announces more is refused unread, one that does not announce it too."""
    with half_sent(server.url, "POST", "/v1/sessions", {**JSON, "Content-Length": str(2**40)}) as sock:
        answer = refused_as(lambda: read_answer(sock), "limit_exceeded")
        assert answer.document["limit"] == 32 * 2**20
    mib = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    with half_sent(server.url, "POST", "/v1/sessions", {**JSON, "Transfer-Encoding": "chunked"}, [mib] * 33) as sock:
        assert read_answer(sock).code == "limit_exceeded"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/msgpack", ""])
def test_a_document_of_another_type_is_refused(raw: RawClient, kind: str) -> None:
    """A document is application/json: a form or text that a browser can send across sites is not one."""
    body = json.dumps(session_document("bad", "w0")).encode()
    refused_as(lambda: raw.request("POST", "/v1/sessions", body, {"content-type": kind}), "invalid_request")


@pytest.mark.parametrize(
    ("groups", "code"),
    [
        (..., "invalid_request"),
        ([], "invalid_request"),
        ({"a": {}}, "invalid_request"),
        ({"-1": {}}, "invalid_request"),
        ({"00": {}}, "invalid_request"),
        ({"٣": {}}, "invalid_request"),
        ({"9" * 10_000: {}}, "invalid_request"),
        ({"0": 1}, "invalid_request"),
        ({"2": {"lr": 1}}, "invalid_option"),
        ({"0": {"lr": 0.5}, "1": {"lr": "x"}}, "invalid_option"),
        ({"0": {"lr": float("nan")}}, "invalid_option"),
        ({"0": {"momentum": 0.5}}, "invalid_option"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_group_options_that_cannot_be_are_refused(raw: RawClient, groups: object, code: str) -> None:
    """Nothing of a document is put into force if something in it is wrong."""
    document = {} if groups is ... else {"groups": groups}
    refused_as(lambda: raw.json("PATCH", "/v1/sessions/standing/groups", document), code)


@pytest.mark.parametrize("epoch", ["", "0", "-1", "1.5", "1.0", "%2B1", "1_0", "%201", "x", "9" * 5000, "1&epoch=x"])
def test_an_epoch_that_is_none_is_refused(raw: RawClient, epoch: str) -> None:
    """A worker leaves with the epoch it joined with; a foreign one is nothing to leave with."""
    refused_as(lambda: raw.request("DELETE", f"/v1/sessions/standing/workers/w0?epoch={epoch}"), "invalid_request")
    refused_as(lambda: raw.request("DELETE", "/v1/sessions/standing/workers/w0"), "invalid_request")
    assert raw.request("DELETE", "/v1/sessions/standing/workers/w0?epoch=7").status == 204


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v1"),
        ("GET", "/v1/"),
        ("GET", "/v1/info/"),
        ("GET", "/V1/info"),
        ("GET", "//v1/info"),
        ("GET", "/v1//info"),
        ("GET", "/v1/sessions/"),
        ("GET", "/v2/sessions"),
        ("GET", "/v1/sessions/standing/nothing"),
        ("GET", "/v1/sessions/standing/workers/"),
        ("GET", "/v1/sessions/..%2f..%2fetc%2fpasswd"),
        ("DELETE", "/v1/sessions/standing%2f"),
        ("GET", "/" + "x" * 20_000),
        ("GET", "/%00"),
        ("POST", "/openapi.json/x"),
    ],
)
def test_a_path_that_there_is_not_is_not_found(raw: RawClient, method: str, path: str) -> None:
    """Paths are exact: no redirect, no trailing slash, no decoding tricks."""
    answer = refused_as(lambda: raw.request(method, path), "no_such_route")
    assert answer.status == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/healthz"),
        ("DELETE", "/v1/info"),
        ("PUT", "/v1/sessions"),
        ("DELETE", "/v1/sessions"),
        ("POST", "/v1/sessions/standing"),
        ("PUT", "/v1/sessions/standing/groups"),
        ("PUT", "/v1/sessions/standing/workers/w0"),
        ("TRACE", "/v1/info"),
        ("OPTIONS", "/v1/sessions"),
        ("PROPFIND", "/v1/sessions"),
    ],
)
def test_a_method_that_the_path_does_not_have_is_refused(raw: RawClient, method: str, path: str) -> None:
    """It is 405, and changes nothing."""
    assert refused_as(lambda: raw.request(method, path), "no_such_method").status == 405


@pytest.mark.parametrize("name", ["-x", "a%20b", "x" * 64, "%C3%A9", "a%00"])
def test_a_session_under_a_name_that_is_none_is_refused(raw: RawClient, name: str) -> None:
    """Routes about one session hold its name to the same rule, or know no such path."""
    for method, path in (
        ("GET", name),
        ("DELETE", name),
        ("GET", f"{name}/workers/w0"),
        ("GET", f"standing/workers/{name}"),
    ):
        answer = raw.request(method, f"/v1/sessions/{path}")
        assert answer.code in ("invalid_request", "no_such_route")


def test_a_session_that_is_not_there_is_not_found(raw: RawClient) -> None:
    """Every route about one session says so."""
    document = {"groups": {"0": {"lr": 1.0}}}
    for ask in (
        lambda: raw.request("GET", "/v1/sessions/nobody"),
        lambda: raw.request("DELETE", "/v1/sessions/nobody"),
        lambda: raw.json("PATCH", "/v1/sessions/nobody/groups", document),
        lambda: raw.request("GET", "/v1/sessions/nobody/workers/w0"),
        lambda: raw.request("DELETE", "/v1/sessions/nobody/workers/w0?epoch=1"),
    ):
        assert refused_as(ask, "unknown_session").status == 404
