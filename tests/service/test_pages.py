"""Listings come in pages, which together hold everything once; a session shows the first of what it has."""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import json
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from farstep.errors import InvalidRequest
from farstep_service.app import create_app
from farstep_service.routes import documents, reading
from farstep_service.routes.pieces import PIECE_CHARS, JsonReader
from farstep_service.server.process import loaded_for_good
from farstep_service.settings import Settings
from tests.support.service.raw import RawClient, session_document
from tests.support.service.servers import RunningServer, farstep

SESSIONS, WORKERS, GROUPS, SEGMENTS = 220, 2_100, 1_100, 20_000
LOOP_S = 0.020
"""CPU time that one turn of the event loop may take, whatever is asked for."""


class TimedLoop(asyncio.SelectorEventLoop):
    """An event loop that knows the CPU time of its longest turn; the load of the machine is not in it."""

    longest_s = 0.0

    def _run_once(self) -> None:
        began = time.thread_time()
        super()._run_once()  # type: ignore[misc]
        self.longest_s = max(self.longest_s, time.thread_time() - began)


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=TimedLoop) as runner:
        runner.run(scene())


@asynccontextmanager
async def asked() -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a server in this process."""
    transport = httpx.ASGITransport(create_app(Settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def joined(client: httpx.AsyncClient, session: str, worker: str = "w0", **document: Any) -> None:
    answer = await client.post("/v1/sessions", json=session_document(session, worker, **document))
    assert answer.status_code == 200, answer.text


async def pages(client: httpx.AsyncClient, path: str) -> list[Any]:
    """Return every page of a listing, following its links."""
    found: list[Any] = []
    url: str | None = path
    while url:
        answer = await client.get(url)
        assert answer.status_code == 200, answer.text
        found.append(answer.json())
        link = answer.links.get("next", {}).get("url")
        url = path + link if link else None
    return found


def large(segments: int) -> dict[str, Any]:
    specs = [{"name": f"layers.{i}.weight", "shape": [1, 2], "dtype": "float32", "group": 0} for i in range(segments)]
    return {"segments": specs}


def test_a_walk_through_all_pages_sees_every_session_once() -> None:
    """Pages of 100 in the order of names; a client that knows of no pages gets the first, and is told of the next."""

    async def scene() -> None:
        async with asked() as client:
            names = [f"s{number:03}" for number in range(SESSIONS)]
            for name in reversed(names):
                await joined(client, name)
            walked = await pages(client, "/v1/sessions")
            assert [len(each) for each in walked] == [100, 100, 20]
            assert [each["name"] for page in walked for each in page] == names
            first = await client.get("/v1/sessions?limit=2")
            assert [each["name"] for each in first.json()] == names[:2]
            await client.delete(f"/v1/sessions/{names[1]}")  # where the next page begins
            following = await client.get(f"/v1/sessions{first.links['next']['url']}")
            assert [each["name"] for each in following.json()] == names[2:4]

    run(scene)


def test_workers_and_groups_are_paged_as_well() -> None:
    """A session shows the first 500 of each and says how many there are; their own routes list all."""

    async def scene() -> None:
        async with asked() as client:
            groups = [{"lr": 0.001 * number} for number in range(GROUPS)]
            workers = [f"w{number:04}" for number in range(1_001)]
            for worker in workers:
                await joined(client, "s", worker)
            await joined(client, "g", groups=groups)
            shown = (await client.get("/v1/sessions/s")).json()
            assert ([*shown["workers"]], shown["worker_count"]) == (workers[:500], 1_001)
            walked = await pages(client, "/v1/sessions/s/workers")
            assert [name for page in walked for name in page] == workers
            assert walked[0] == {**shown["workers"]} or walked[0].keys() == shown["workers"].keys()
            shown = (await client.get("/v1/sessions/g")).json()
            assert (len(shown["groups"]), shown["group_count"]) == (500, GROUPS)
            changed = await client.patch("/v1/sessions/g/groups", json={"groups": {str(GROUPS - 1): {"lr": 7.0}}})
            assert len(changed.json()) == 500
            listed = [group["lr"] for page in await pages(client, "/v1/sessions/g/groups") for group in page["groups"]]
            assert listed == [group["lr"] for group in groups[:-1]] + [7.0]

    run(scene)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "after=" + "x" * 64])
def test_a_page_that_cannot_be_is_refused(query: str) -> None:
    """No client can ask for a page of any length."""

    async def scene() -> None:
        async with asked() as client:
            assert (await client.get(f"/v1/sessions?{query}")).json()["code"] == "invalid_request"

    run(scene)


def test_the_command_line_walks_all_pages(server: RunningServer) -> None:
    """`sessions ls`, `status` and `sessions show` know all sessions, workers and param groups, not the first page."""
    names = [f"p{number:03}" for number in range(105)]
    groups = [{"lr": 0.001 * number} for number in range(601)]
    with RawClient(server.url) as raw:
        for name in names:
            assert raw.json("POST", "/v1/sessions", session_document(name, "w0")).status == 200
        assert raw.json("POST", "/v1/sessions", session_document("wide", "w0", groups=groups)).status == 200
        for number in range(501):
            assert raw.json("POST", "/v1/sessions", session_document("crowd", f"w{number}")).status == 200
        listed = json.loads(farstep("sessions", "ls", "--json", "--server", server.url, loaded=True).stdout)
        assert [each["name"] for each in listed] == ["crowd", *names, "wide"]
        assert f"and {len(names) + 2 - 15} more" in farstep("status", "--server", server.url, loaded=True).stdout
        shown = json.loads(farstep("sessions", "show", "crowd", "--json", "--server", server.url, loaded=True).stdout)
        assert sorted(shown["workers"]) == sorted(f"w{number}" for number in range(501))
        shown = json.loads(farstep("sessions", "show", "wide", "--json", "--server", server.url, loaded=True).stdout)
        assert [group["lr"] for group in shown["groups"]] == [group["lr"] for group in groups]
        for name in (*names, "crowd", "wide"):
            raw.request("DELETE", f"/v1/sessions/{name}")


# -- the event loop's time --------------------------------------------------------------------------------------------


@pytest.fixture
def loaded() -> Iterator[None]:
    """Let the collector of garbage leave alone what is loaded, as in a server, whose answers it must not count in."""
    thresholds = gc.get_threshold()
    gc.collect()
    with loaded_for_good():
        pass
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("loaded")
def test_no_answer_of_a_control_route_takes_the_event_loop_for_long() -> None:
    """With thousands of workers, groups and parameters no turn of the loop takes 20 ms of the CPU, joins included."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, TimedLoop)
        async with asked() as client:
            assert (await client.get("/openapi.json")).status_code == 200
            for number in range(SESSIONS):
                await joined(client, f"s{number:03}")
            for number in range(WORKERS):
                await joined(client, "crowd", f"w{number:04}")
            body = json.dumps(session_document("large", "w0", groups=[{"lr": 0.1}] * GROUPS, **large(SEGMENTS)))
            requests: list[tuple[str, str, str | None]] = [
                ("POST", "/v1/sessions", body),
                ("POST", "/v1/sessions", body),
                ("GET", "/v1/sessions", None),
                ("GET", "/v1/sessions/crowd", None),
                ("GET", "/v1/sessions/crowd/workers", None),
                ("GET", "/v1/sessions/large", None),
                ("GET", "/v1/sessions/large/groups", None),
                ("GET", "/v1/info", None),
                ("GET", "/openapi.json", None),
                ("GET", "/docs", None),
                (
                    "PATCH",
                    "/v1/sessions/large/groups",
                    json.dumps({"groups": {str(i): {"lr": 0.5} for i in range(GROUPS)}}),
                ),
                ("DELETE", "/v1/sessions/large", None),
                ("DELETE", "/v1/sessions/crowd", None),
            ]
            for method, path, content in requests:
                await asyncio.sleep(0)  # this turn has been the test's own
                loop.longest_s = 0.0
                answer = await client.request(method, path, content=content, headers={"content-type": JSON})
                assert answer.is_success, answer.text
                assert loop.longest_s < LOOP_S, f"{method} {path} took {loop.longest_s:.3f} s"

    run(scene)


JSON = "application/json"


@pytest.mark.usefixtures("loaded")
def test_no_call_holds_the_interpreter_for_long_while_a_document_is_read() -> None:
    """Whatever thread it is in: none of the functions in C that read 20,000 parameters takes 20 ms by itself."""
    body = json.dumps(session_document("large", "w0", groups=[{"lr": 0.1}] * GROUPS, **large(SEGMENTS))).encode()
    began: list[float] = []
    longest: dict[str, float] = {}

    def profile(_frame: object, event: str, function: Any) -> None:
        if event == "c_call":
            began.append(time.thread_time())
        elif event in ("c_return", "c_exception") and began:
            name = function.__qualname__
            longest[name] = max(longest.get(name, 0.0), time.thread_time() - began.pop())

    plans = []

    def read() -> None:
        sys.setprofile(profile)
        try:
            document = reading.read([body], *reading.IN_PIECES["POST /v1/sessions"])
            plans.append(documents.plan_of(documents.SessionDocument.model_validate(document)))
        finally:
            sys.setprofile(None)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    (plan,) = plans
    assert (len(plan.layout.segments), len(plan.groups)) == (SEGMENTS, GROUPS)
    assert len(longest) > 5
    # A collection of garbage may begin in any call; what calls back into Python counts what that calls.
    ordered = sorted(longest.items(), key=lambda each: each[1], reverse=True)
    assert ordered[0][1] < LOOP_S, ordered[:3]


# -- reading in pieces ------------------------------------------------------------------------------------------------

TEXTS = [
    b'{"a": [1, 2.5, -3e2, "x\\u00e9\\n", null, true, {"b": []}], "c": {}, "d": {"e": 12}}',
    ' \t\r\n{ "\u00e9" : "\u4e2d\U0001f600" , "n":\n1234567890 }\r\n'.encode(),
    b"[]",
    b"-12",
    b'"text"',
    b'{"a": 1} x',
    b'{"a": 1',
    b'{"a" 1}',
    b'{"a": 1,}',
    b"{1: 2}",
    b'{"a": [1 2]}',
    b'{"a": [1,]}',
    b'{"a": "\xff"}',
    b"",
    b"   ",
    b"nul",
]


def generic(reader: JsonReader) -> object:
    """Read any document, its lists and objects in pieces down to the second floor."""
    kind = reader.peek()
    if kind == "{":
        return {key: list_or_value(reader) for key in reader.members()}
    return list_or_value(reader)


def whole(reader: JsonReader) -> object:
    found = generic(reader)
    reader.end()
    return found


def list_or_value(reader: JsonReader) -> object:
    return [reader.value() for _ in reader.elements()] if reader.peek() == "[" else reader.value()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize("text", TEXTS)
def test_a_document_in_pieces_is_the_one_that_python_reads(text: bytes, size: int) -> None:
    """However its bytes are cut, it is read as `json.loads` reads it, and refused where that refuses it."""
    reader = JsonReader([text[at : at + size] for at in range(0, len(text), size)])
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(InvalidRequest, match="no JSON"):
            whole(reader)
        return
    assert whole(reader) == expected


def test_a_value_that_is_too_long_is_refused_where_it_begins() -> None:
    """One element cannot be so long that decoding it would be a turn of its own, and a key cannot be there twice."""
    long = b'{"a": [1, "' + b"x" * (2 * PIECE_CHARS) + b'"]}'
    with pytest.raises(InvalidRequest, match=re.escape(f"has more than {PIECE_CHARS} characters")):
        generic(JsonReader([long]))
    with pytest.raises(InvalidRequest, match="'a' is there twice"):
        generic(JsonReader([b'{"a": 1, "a": 2}']))
    with pytest.raises(ValidationError):
        documents.SessionDocument.model_validate({"name": "s"})


def test_info_reads_no_files_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is looked up once, not for each request: that parses a file on the event loop."""

    async def scene() -> None:
        async with asked() as client:
            with monkeypatch.context() as patched:
                patched.setattr(importlib.metadata.Distribution, "from_name", lambda name: pytest.fail(name))
                answer = await client.get("/v1/info")
            assert answer.json()["farstep"] == importlib.metadata.version("farstep")

    run(scene)
