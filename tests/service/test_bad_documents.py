"""Bad input on the control routes: JSON documents, names, options, paths and methods."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.service.answers import Answer, half_sent, read_answer
from tests.service.raw import RawClient, RawWorker, session_document
from tests.service.servers import RunningServer

JSON = {"content-type": "application/json"}
AT_ONCE_S = 1.0
BAD_NAMES: tuple[object, ...] = (
    "",
    ".",
    "..",
    "../up",
    "a/b",
    "a\\b",
    "-dash",
    "_under",
    " space",
    "a b",
    "a\x00",
    "a\n",
    "a%2fb",
    "é",
    "\ud800",
    "x" * 64,
    "x" * 100_000,
    1,
    None,
    ["s"],
    {},
    True,
)


@pytest.fixture(scope="module")
def standing(raw: RawClient) -> RawWorker:
    """Return the worker of a session that stays as it is."""
    return raw.begun("standing", groups=[{"lr": 0.1}, {"lr": 0.2}])[0]


def seen(raw: RawClient) -> str:
    """Return what the server says of all sessions, but for how long leases still run, which is a matter of time."""
    pages = raw.request("GET", "/v1/sessions").document
    for worker in (worker for page in pages for worker in page["workers"].values()):
        del worker["lease_s"]
    return json.dumps(pages)


@pytest.fixture(autouse=True)
def unchanged(raw: RawClient, standing: RawWorker, server: RunningServer) -> Iterator[None]:
    """Check after a test that sessions are as they were, and that nothing went wrong inside."""
    before, log = seen(raw), len(server.log)
    yield
    assert seen(raw) == before
    assert "Traceback" not in server.log[log:], server.log[log:]
    assert "internal error" not in server.log[log:]


def refused(ask: Callable[[], Answer], *codes: str) -> Answer:
    """Check that a request is refused with one of these codes, at once and in words."""
    began = time.perf_counter()
    answer = ask()
    assert time.perf_counter() - began < AT_ONCE_S
    assert answer.code in codes, answer.body
    assert 400 <= answer.status < 500
    return answer


def create(raw: RawClient, **document: Any) -> Answer:
    return raw.json("POST", "/v1/sessions", {**session_document("bad", "w0"), **document})


@pytest.mark.parametrize("key", ["name", "worker"])
@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:12])
def test_a_name_that_is_no_name_is_refused(raw: RawClient, key: str, name: object) -> None:
    """Sessions and workers have names of letters, digits, dot, dash and underscore, 63 at most."""
    answer = refused(lambda: create(raw, **{key: name}), "invalid_request")
    assert answer.document["field"] == key


@pytest.mark.parametrize("key", ["name", "worker", "optimizer", "groups", "segments"])
def test_a_document_without_a_field_is_refused(raw: RawClient, key: str) -> None:
    """A missing field is named."""
    document = session_document("bad", "w0")
    del document[key]
    answer = refused(lambda: raw.json("POST", "/v1/sessions", document), "invalid_request")
    assert answer.document["field"] == key


@pytest.mark.parametrize(
    ("document", "code"),
    [
        ({"unheard_of": 1}, "invalid_request"),
        ({"optimizer": 1}, "invalid_request"),
        ({"optimizer": ["Adagrad"]}, "invalid_request"),
        ({"optimizer": "Adam" * 10_000}, "invalid_option"),
        ({"optimizer": "adagrad"}, "invalid_option"),
        ({"optimizer": "__class__"}, "invalid_option"),
        ({"groups": []}, "invalid_request"),
        ({"groups": {}}, "invalid_request"),
        ({"groups": [1]}, "invalid_request"),
        ({"groups": [None]}, "invalid_request"),
        ({"groups": [{}] * 10_001}, "limit_exceeded"),
        ({"groups": [{"momentum": 1}]}, "invalid_option"),
        ({"groups": [{"x" * 100_000: 1}]}, "invalid_option"),
        ({"groups": [{"lr": -1}]}, "invalid_option"),
        ({"groups": [{"lr": True}]}, "invalid_option"),
        ({"groups": [{"lr": "0.1"}]}, "invalid_option"),
        ({"groups": [{"lr": "9" * 100_000}]}, "invalid_option"),
        ({"groups": [{"lr": None}]}, "invalid_option"),
        ({"groups": [{"lr": [0.1]}]}, "invalid_option"),
        ({"groups": [{"lr": {}}]}, "invalid_option"),
        ({"groups": [{"lr": float("nan")}]}, "invalid_option"),
        ({"groups": [{"lr": float("inf")}]}, "invalid_option"),
        ({"groups": [{"lr": 10**400}]}, "invalid_option"),
        ({"groups": [{"differentiable": True}]}, "invalid_option"),
        ({"segments": []}, "invalid_request"),
        ({"segments": {}}, "invalid_request"),
        ({"segments": [1]}, "invalid_request"),
        ({"segments": [{}]}, "invalid_request"),
        ({"consistency": "sync"}, "invalid_request"),
        ({"consistency": {}}, "invalid_option"),
        ({"consistency": {"mode": "sync"}}, "invalid_option"),
        ({"consistency": {"mode": "eventual"}}, "invalid_option"),
        ({"consistency": {"mode": ["sync"]}}, "invalid_option"),
        ({"consistency": {"mode": "async", "workers": 1}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": 0}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": 1.5}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": "2"}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": 2, "deadline_s": 0}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": 2, "deadline_s": float("nan")}}, "invalid_option"),
        ({"consistency": {"mode": "sync", "workers": 2, "deadline_s": float("inf")}}, "invalid_option"),
        ({"consistency": {"mode": "x" * 100_000}}, "invalid_option"),
        ({"consistency": {"mode": "async", "y" * 100_000: 1}}, "invalid_option"),
        ({"nonfinite": "maybe"}, "invalid_request"),
        ({"nonfinite": True}, "invalid_request"),
        ({"policy": "clip"}, "invalid_request"),
        ({"policy": None}, "invalid_request"),
        ({"policy": {"clip": 1.0}}, "invalid_option"),
        ({"policy": {"clip_norm": 0}}, "invalid_option"),
        ({"policy": {"clip_norm": -1.0}}, "invalid_option"),
        ({"policy": {"clip_norm": "1"}}, "invalid_option"),
        ({"policy": {"clip_norm": [1]}}, "invalid_option"),
        ({"policy": {"clip_norm": True}}, "invalid_option"),
        ({"policy": {"clip_norm": float("nan")}}, "invalid_option"),
        ({"policy": {"clip_norm": 10**400}}, "invalid_option"),
        ({"policy": {"clip_norm": 1, "clip_norm_type": "nan"}}, "invalid_option"),
        ({"policy": {"clip_value": {}}}, "invalid_option"),
        ({"policy": {"accumulate": 0}}, "invalid_option"),
        ({"policy": {"accumulate": 2.0}}, "invalid_option"),
        ({"policy": {"accumulate": 10**9}}, "invalid_option"),
        ({"policy": {"ema": 1}}, "invalid_option"),
        ({"policy": {"ema": "inf"}}, "invalid_option"),
        ({"policy": {"ema" * 50_000: 1}}, "invalid_option"),
        ({"kernel": "magic"}, "invalid_request"),
        ({"kernel": None}, "invalid_request"),
    ],
    ids=lambda value: repr(value)[:60] if isinstance(value, dict) else value,
)
def test_a_session_that_cannot_be_is_refused(raw: RawClient, document: dict[str, Any], code: str) -> None:
    """Fields nobody knows, of a wrong type or out of range; no session is left behind."""
    refused(lambda: create(raw, **document), code)


def test_a_deadline_beyond_all_time_is_refused(raw: RawClient) -> None:
    """A deadline is a number that a clock can reach; an int that no float can hold is none."""
    consistency = {"mode": "sync", "workers": 2, "deadline_s": 10**400}
    answer = raw.json("POST", "/v1/sessions", session_document("bad", "w0", consistency=consistency))
    raw.request("DELETE", "/v1/sessions/bad")
    assert answer.status == 422


def segment(**changes: Any) -> dict[str, Any]:
    return {"name": "p", "shape": [2], "dtype": "float32", "group": 0, **changes}


@pytest.mark.parametrize(
    ("segments", "codes"),
    [
        ([segment(name="")], ("tensor_mismatch",)),
        ([segment(name="x" * 257)], ("tensor_mismatch",)),
        ([segment(name="x" * 1_000_000)], ("tensor_mismatch",)),
        ([segment(name="a\x00b")], ("tensor_mismatch",)),
        ([segment(name="a\nb")], ("tensor_mismatch",)),
        ([segment(name="\ud800")], ("tensor_mismatch", "invalid_request")),
        ([segment(name=None)], ("invalid_request",)),
        ([segment(), segment()], ("tensor_mismatch",)),
        ([segment(dtype="int64")], ("tensor_mismatch",)),
        ([segment(dtype="float8_e4m3fn")], ("tensor_mismatch",)),
        ([segment(dtype="Float32")], ("tensor_mismatch",)),
        ([segment(dtype="__import__")], ("tensor_mismatch",)),
        ([segment(dtype="x" * 1_000_000)], ("tensor_mismatch",)),
        ([segment(dtype=4)], ("invalid_request",)),
        ([segment(shape=[-1])], ("tensor_mismatch",)),
        ([segment(shape=[1.0])], ("invalid_request",)),
        ([segment(shape=[True])], ("invalid_request",)),
        ([segment(shape=["2"])], ("invalid_request",)),
        ([segment(shape=2)], ("invalid_request",)),
        ([segment(shape=None)], ("invalid_request",)),
        ([segment(shape=[1] * 17)], ("limit_exceeded",)),
        ([segment(shape=[1] * 100_000)], ("limit_exceeded",)),
        ([segment(shape=[2**61])], ("tensor_mismatch", "limit_exceeded")),
        ([segment(shape=[2**59])], ("limit_exceeded",)),
        ([segment(shape=[2**40, 2**40])], ("limit_exceeded",)),
        ([segment(shape=[2**20] * 16)], ("limit_exceeded",)),
        ([segment(shape=[10**30])], ("tensor_mismatch", "invalid_request")),
        ([segment(name=f"p{i}", shape=[2**34]) for i in range(4)], ("limit_exceeded",)),
        ([segment(group=-1)], ("tensor_mismatch",)),
        ([segment(group=1)], ("invalid_option",)),
        ([segment(group=True)], ("invalid_request",)),
        ([segment(group=2**62)], ("limit_exceeded", "tensor_mismatch")),
        ([segment(color="red")], ("invalid_request",)),
    ],
    ids=lambda value: repr(value)[:60] if isinstance(value, list) else "",
)
def test_a_parameter_that_cannot_be_is_refused(
    raw: RawClient, segments: list[dict[str, Any]], codes: tuple[str, ...]
) -> None:
    """Names, dtypes, shapes, groups and sizes are checked in Python's integers, before memory is thought of."""
    refused(lambda: create(raw, segments=segments), *codes)


def test_more_parameters_than_a_session_may_have_are_refused(raw: RawClient) -> None:
    """100,000 is the most; the refusal names the limit."""
    segments = [{"name": str(index), "shape": [], "dtype": "float32"} for index in range(100_001)]
    answer = create(raw, segments=segments)
    assert (answer.status, answer.code, answer.document["limit"]) == (413, "limit_exceeded", 100_000)


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
    refused(lambda: raw.request(method, path, body, JSON), "invalid_request")


def test_a_document_that_is_too_large_is_refused(server: RunningServer, raw: RawClient) -> None:
    """A document has 32 MiB at most: one that announces more is refused unread, one that does not announce it too."""
    with half_sent(server.url, "POST", "/v1/sessions", {**JSON, "Content-Length": str(2**40)}) as sock:
        answer = refused(lambda: read_answer(sock), "limit_exceeded")
        assert answer.document["limit"] == 32 * 2**20
    mib = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    with half_sent(server.url, "POST", "/v1/sessions", {**JSON, "Transfer-Encoding": "chunked"}, [mib] * 33) as sock:
        assert read_answer(sock).code == "limit_exceeded"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/msgpack", ""])
def test_a_document_of_another_type_is_refused(raw: RawClient, kind: str) -> None:
    """A document is application/json: a form or text that a browser can send across sites is not one."""
    body = json.dumps(session_document("bad", "w0")).encode()
    refused(lambda: raw.request("POST", "/v1/sessions", body, {"content-type": kind}), "invalid_request")


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
    refused(lambda: raw.json("PATCH", "/v1/sessions/standing/groups", document), code)


@pytest.mark.parametrize("epoch", ["", "0", "-1", "1.5", "x", "9" * 5000, "1&epoch=x"])
def test_an_epoch_that_is_none_is_refused(raw: RawClient, epoch: str) -> None:
    """A worker leaves with the epoch it joined with; a foreign one is nothing to leave with."""
    refused(lambda: raw.request("DELETE", f"/v1/sessions/standing/workers/w0?epoch={epoch}"), "invalid_request")
    refused(lambda: raw.request("DELETE", "/v1/sessions/standing/workers/w0"), "invalid_request")
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
        ("GET", "/v1/sessions/standing/workers"),
        ("GET", "/v1/sessions/..%2f..%2fetc%2fpasswd"),
        ("DELETE", "/v1/sessions/standing%2f"),
        ("GET", "/" + "x" * 20_000),
        ("GET", "/%00"),
        ("POST", "/openapi.json/x"),
    ],
)
def test_a_path_that_there_is_not_is_not_found(raw: RawClient, method: str, path: str) -> None:
    """Paths are exact: no redirect, no trailing slash, no decoding tricks."""
    answer = refused(lambda: raw.request(method, path), "no_such_route")
    assert answer.status == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/healthz"),
        ("DELETE", "/v1/info"),
        ("PUT", "/v1/sessions"),
        ("DELETE", "/v1/sessions"),
        ("POST", "/v1/sessions/standing"),
        ("GET", "/v1/sessions/standing/groups"),
        ("PUT", "/v1/sessions/standing/workers/w0"),
        ("TRACE", "/v1/info"),
        ("OPTIONS", "/v1/sessions"),
        ("PROPFIND", "/v1/sessions"),
    ],
)
def test_a_method_that_the_path_does_not_have_is_refused(raw: RawClient, method: str, path: str) -> None:
    """It is 405, and changes nothing."""
    assert refused(lambda: raw.request(method, path), "no_such_method").status == 405


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
        assert refused(ask, "unknown_session").status == 404


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"optimizer": "ASGD", "groups": [{}, {}]}, "optimizer"),
        ({"groups": [{"lr": 0.1}]}, "groups"),
        ({"groups": [{"lr": 0.1}, {"lr": 0.3}]}, "lr of its group 1"),
        ({"groups": [{"lr": 0.1}, {"lr": 0.2, "eps": 1e-3}]}, "eps of its group 1"),
        ({"parameters": [torch.zeros(5)]}, "[4]"),
        ({"parameters": [torch.zeros(4, dtype=torch.float64)]}, "float64"),
        ({"parameters": [torch.zeros(4), torch.zeros(1)]}, "1 parameters, not 2"),
        ({"consistency": {"mode": "sync", "workers": 2}}, "consistency"),
        ({"nonfinite": "allow"}, "nonfinite"),
        ({"policy": {"ema": 0.5}}, "ema is None, not 0.5"),
        ({"kernel": "auto"}, "kernel"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_joining_with_other_options_names_the_difference(raw: RawClient, document: dict[str, Any], named: str) -> None:
    """A session is joined by those who mean the same; the refusal says what differs, and from what."""
    given = session_document("standing", "w9", **{"groups": [{"lr": 0.1}, {"lr": 0.2}], **document})
    answer = refused(lambda: raw.json("POST", "/v1/sessions", given), "options_differ")
    assert answer.status == 409
    assert named in answer.document["detail"]
