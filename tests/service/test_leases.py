"""The lease of a worker over HTTP: heartbeats as PROTOCOL.md says, pages that tell of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.service.raw import RawClient, RawWorker
from tests.support.service.servers import RunningServer
from tests.support.wire.page import blocks

SYNC = {"mode": "sync", "workers": 2}
EXAMPLE = {block.info[1]: json.loads(block.text) for block in blocks() if block.title == "A heartbeat"}


@pytest.fixture
def raw(server: RunningServer) -> Iterator[RawClient]:
    with RawClient(server.url) as client:
        yield client


@pytest.fixture
def w0(raw: RawClient, request: pytest.FixtureRequest) -> Iterator[RawWorker]:
    """Return the first of two workers of a session of this test's own."""
    name = str(abs(hash(request.node.name)))
    yield raw.begun(name, "w0", "w1", consistency=SYNC)[0]
    raw.request("DELETE", f"/v1/sessions/{name}")


def lease(worker: RawWorker, name: str = "w0") -> str:
    return f"{worker.path}/workers/{name}/lease"


def test_the_example_of_the_protocol_is_what_is_said(raw: RawClient, w0: RawWorker) -> None:
    """The request of the document is taken, and answered with its reply, but for what is this session's own."""
    mine = {"incarnation": w0.joined["incarnation"]}
    answer = raw.json("PUT", lease(w0), EXAMPLE["request"] | mine)
    assert answer.status == 200
    assert answer.document == EXAMPLE["reply"] | mine | {"version": w0.version}


def test_a_page_says_how_long_the_lease_runs(raw: RawClient, w0: RawWorker) -> None:
    """That of the worker and that of the session; asking for them renews nothing, a heartbeat does."""
    path = f"{w0.path}/workers/w0"
    first, second = (raw.request("GET", path).document["lease_s"] for _ in range(2))
    assert 60.0 > first > second > 0.0
    assert raw.request("GET", f"{w0.path}/workers/nobody").document["lease_s"] == 0.0
    raw.json("PUT", lease(w0), {"epoch": w0.joined["epoch"], "incarnation": w0.joined["incarnation"]})
    page = raw.request("GET", w0.path).document["workers"]["w0"]
    assert page["live"]
    assert second < page["lease_s"] <= 60.0


@pytest.mark.parametrize(
    ("worker", "change", "status", "code"),
    [
        ("w0", {"epoch": 2}, 409, "fenced"),
        ("w7", {}, 409, "fenced"),
        ("w0", {"incarnation": "0" * 32}, 410, "session_lost"),
        ("w0", {"epoch": 0}, 400, "invalid_request"),
        ("w0", {"epoch": "1"}, 400, "invalid_request"),
        ("w0", {"epoch": True}, 400, "invalid_request"),
        ("w0", {"incarnation": "0" * 1000}, 400, "invalid_request"),
        ("w0", {"version": 1}, 400, "invalid_request"),
        ("w%200", {}, 400, "invalid_request"),
    ],
)
def test_a_heartbeat_that_is_none_is_refused(
    raw: RawClient, w0: RawWorker, worker: str, change: dict[str, Any], status: int, code: str
) -> None:
    """Another epoch, another worker, another life of the session, and documents that are none: by their codes."""
    document = {"epoch": w0.joined["epoch"], "incarnation": w0.joined["incarnation"]} | change
    answer = raw.json("PUT", lease(w0, worker), document)
    assert (answer.status, answer.document["code"]) == (status, code)


def test_a_session_that_is_not_there_has_no_leases(raw: RawClient, w0: RawWorker) -> None:
    """A heartbeat for it is not found."""
    document = {"epoch": 1, "incarnation": w0.joined["incarnation"]}
    answer = raw.json("PUT", "/v1/sessions/not-there/workers/w0/lease", document)
    assert (answer.status, answer.document["code"]) == (404, "unknown_session")
