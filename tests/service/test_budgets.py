"""What a server has room for: sessions, their parameters, and the memory of requests in flight."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
import torch

import farstep
from farstep.errors import Busy, LimitExceeded, UnknownSession
from farstep.protocol import encode
from farstep.protocol.messages import PushHead, PutHead, WriteName
from farstep_service.layout import SegmentSpec
from farstep_service.plan import Plan
from farstep_service.sessions import Actor
from farstep_service.sessions.registry import Registry
from farstep_service.settings import Settings
from tests.support.service.answers import MSGPACK, half_sent
from tests.support.service.raw import RawClient, session_document
from tests.support.service.servers import running_server

ASYNC: Mapping[str, object] = {"mode": "async"}


def plan(name: str, elements: int, consistency: Mapping[str, object] = ASYNC) -> Plan:
    return Plan.build(
        name=name,
        optimizer="Adagrad",
        groups=[{}],
        segments=[SegmentSpec("p", (elements,), "float32")],
        consistency=consistency,
        nonfinite="refuse",
        kernel="reference",
    )


def registry(**limits: Any) -> Registry:
    return Registry(Settings(**limits), ThreadPoolExecutor(1))


@pytest.mark.promise(
    "Documents, sessions and parameters have stated limits, and a refusal names the one that was passed.",
    area="limits",
)
def test_a_session_larger_than_one_may_be_is_refused() -> None:
    """The largest session is a setting; the refusal names it."""

    async def talk() -> None:
        sessions = registry(max_session_bytes=400)
        await sessions.place(plan("fits", 100))
        with pytest.raises(LimitExceeded) as raised:
            await sessions.place(plan("large", 101))
        assert raised.value.limit == 400
        assert [actor.name for actor in sessions.actors] == ["fits"]

    asyncio.run(talk())


def test_sessions_are_counted() -> None:
    """A server that has as many as it may have is busy until one is removed; those that exist can be joined."""

    async def talk() -> None:
        sessions = registry(max_sessions=2)
        for name in ("a", "b"):
            await sessions.place(plan(name, 1))
        with pytest.raises(Busy):
            await sessions.place(plan("c", 1))
        assert (await sessions.place(plan("a", 1)))[1] is False
        await sessions.remove("a")
        assert (await sessions.place(plan("c", 1)))[1] is True
        with pytest.raises(UnknownSession):
            sessions.find("a")

    asyncio.run(talk())


async def filled(sessions: Registry, name: str, elements: int) -> Actor:
    """Create a session and send its first parameters."""
    host, _ = await sessions.place(plan(name, elements))
    await host.join("w0", 1)
    head = PutHead(WriteName("w0", 1, 1), host.incarnation, ("param",), initial=True)
    with sessions.in_flight() as reserve:
        reserve(4 * elements)
        await host.put(head, host.begin_put(head, 4 * elements), "first")
    return host


def test_what_sessions_hold_is_counted_and_not_what_they_announce() -> None:
    """Sessions without contents take no room; parameters and state do when they come, until they are removed."""

    async def talk() -> None:
        sessions = registry(max_bytes=2000)
        for number in range(20):
            await sessions.place(plan(f"empty{number}", 200))
        assert sessions.budget.held_bytes == 0
        await filled(sessions, "a", 150)
        assert sessions.budget.held_bytes == 1200, "the state of Adagrad is as large as the parameters"
        with pytest.raises(Busy) as raised:
            await filled(sessions, "b", 101)
        assert raised.value.limit == 2000
        assert raised.value.extra == {"asked": 404, "available": 396}
        assert sessions.budget.held_bytes == 1200
        await filled(sessions, "c", 100)
        assert sessions.budget.held_bytes == 2000
        await sessions.remove("a")
        assert sessions.budget.held_bytes == 800

    asyncio.run(talk())


def test_versions_that_workers_have_are_counted_and_given_up() -> None:
    """Bases of delay compensation are held memory; where there is no room for another, the oldest is let go."""

    async def talk() -> None:
        sessions = registry(max_bytes=10 * 4000)
        mode = {"mode": "async", "delay_compensation": 0.1}
        host, _ = await sessions.place(plan("a", 1000, mode))
        for number in range(40):
            await host.join(f"w{number}", 1)
        head = PutHead(WriteName("w0", 1, 1), host.incarnation, ("param",), initial=True)
        await host.put(head, host.begin_put(head, 4000), "first")
        applied = 0
        for number in range(40):
            version = (await host.summary()).version
            push = PushHead(WriteName(f"w{number}", 1, 1 + (number == 0)), host.incarnation, version)
            intake = host.begin_push(push, 4000)
            for view in intake.views:
                view[:] = bytes(len(view))
            applied += (await host.push(push, intake, f"{number}")).receipt.applied
            (await host.reads.parameters(write=push.name)).release()
            assert sum((await host.summary()).bytes.values()) <= 10 * 4000
        assert applied == 40

    asyncio.run(talk())


def test_memory_in_flight_is_counted_and_given_back() -> None:
    """Requests share a budget; one that ends, however it ends, gives its share back."""
    sessions = registry(max_bytes=1000)
    with sessions.in_flight() as one, sessions.in_flight() as other:
        one(600)
        with pytest.raises(Busy):
            other(401)
        other(300)
        other(100)
    with suppress(RuntimeError), sessions.in_flight() as one:
        one(1000)
        raise RuntimeError
    with sessions.in_flight() as one, sessions.in_flight() as other:
        one(1000)
        with pytest.raises(Busy):
            other(1)


def test_a_request_beyond_the_limit_is_refused_alone_too() -> None:
    """Beside what sessions hold, requests take what is left; the refusal says what was asked and what there is."""

    async def talk() -> None:
        sessions = registry(max_bytes=1000)
        await filled(sessions, "a", 100)
        with sessions.in_flight() as one:
            with pytest.raises(Busy) as raised:
                one(201)
            assert raised.value.extra == {"asked": 201, "available": 200}
            one(200)

    asyncio.run(talk())


def test_what_could_never_fit_is_refused_for_good() -> None:
    """More than a server may use in all is no matter of waiting: the client raises at once and names the limit."""
    with running_server("--max-gib", str(1000 / 2**30), loaded=True) as small:
        with pytest.raises(LimitExceeded, match="max-gib") as raised:
            farstep.optim.SGD([torch.zeros(251, requires_grad=True)], lr=0.1, server=small.url, timeout_s=60)
        assert raised.value.limit == 1000
        with RawClient(small.url) as raw:
            answer = raw.json("POST", "/v1/sessions", session_document("s", "w0", [torch.zeros(251)]))
            assert (answer.status, answer.document["asked"]) == (413, 1004)
            raw.begun("s", parameters=[torch.zeros(100)])


@pytest.mark.promise("A server without memory for a request says so, changes nothing, and goes on.", area="memory")
def test_a_server_that_is_full_says_when_to_come_again() -> None:
    """A body for which there is no room while others are on their way is answered 503, and is taken later."""
    parameters = (torch.zeros(1 << 20),)
    with running_server("--max-gib", str(14 * 2**20 / 2**30), loaded=True) as server, RawClient(server.url) as raw:
        (worker,) = raw.begun("s", parameters=parameters)
        pieces = encode(*worker.message([torch.ones(1 << 20)]))
        headers = {"Content-Type": MSGPACK, "Content-Length": str(sum(memoryview(each).nbytes for each in pieces))}
        body, path = b"".join(pieces), f"{worker.path}/push"

        def push_while_another_is_on_its_way() -> httpx.Response:
            with half_sent(server.url, "POST", path, headers, [pieces[0]]):
                return raw.http.post(path, content=body, headers=headers)

        while (answer := push_while_another_is_on_its_way()).status_code == 200:
            pass  # it overtook the other one
        assert (answer.status_code, answer.json()["code"]) == (503, "busy")
        assert answer.headers["retry-after"] == "1"
        while (answer := raw.http.post(path, content=body, headers=headers)).status_code == 503:
            pass
        assert answer.status_code == 200
        assert worker.version == 1


def test_a_server_says_how_much_memory_it_could_still_give() -> None:
    """Whoever is about to bring a large model can ask before: it is less than the machine has."""
    with running_server(loaded=True) as server, RawClient(server.url) as raw:
        free = raw.request("GET", "/v1/info").document["available_bytes"]
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_round_that_a_deadline_takes_is_in_the_account(raw: RawClient) -> None:
    """What the server holds is what its session's page says, also when a tick was the last that changed it."""

    def held() -> int:
        return int(raw.request("GET", "/v1/info").document["held_bytes"])

    def page() -> int:
        return int(sum(raw.request("GET", "/v1/sessions/ticked").document["bytes"].values()))

    before = held()
    live = {"mode": "sync", "workers": "live", "deadline_s": 0.2}
    parameters = (torch.zeros(1000),)
    policy = {"accumulate": 2}
    first, _ = raw.begun("ticked", "w0", "w1", parameters=parameters, consistency=live, policy=policy)
    try:
        for _ in range(4):
            assert first.push([torch.ones(1000)]).status == 200
            assert held() - before == page()
    finally:
        raw.request("DELETE", "/v1/sessions/ticked")
