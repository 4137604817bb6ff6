"""What a server has room for: sessions, their parameters, and the memory of requests in flight."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
import torch

from farstep.errors import Busy, LimitExceeded, UnknownSession
from farstep.wire import encode
from farstep_service.layout import SegmentSpec
from farstep_service.plan import Plan
from farstep_service.registry import Registry
from farstep_service.settings import Settings
from tests.service.answers import MSGPACK, half_sent
from tests.service.raw import RawClient
from tests.service.servers import running_server


def plan(name: str, elements: int) -> Plan:
    return Plan.build(
        name=name,
        optimizer="Adagrad",
        groups=[{}],
        segments=[SegmentSpec("p", (elements,), "float32")],
        consistency={"mode": "async"},
        nonfinite="refuse",
        kernel="reference",
    )


def registry(**limits: Any) -> Registry:
    return Registry(Settings(**limits), ThreadPoolExecutor(1))


def test_a_session_larger_than_one_may_be_is_refused() -> None:
    """The largest session is a setting; the refusal names it."""

    async def talk() -> None:
        sessions = registry(max_session_bytes=400)
        await sessions.create_or_join(plan("fits", 100))
        with pytest.raises(LimitExceeded) as raised:
            await sessions.create_or_join(plan("large", 101))
        assert raised.value.limit == 400
        assert [host.name for host in sessions.hosts] == ["fits"]

    asyncio.run(talk())


def test_sessions_are_counted() -> None:
    """A server that has as many as it may have is busy until one is removed; those that exist can be joined."""

    async def talk() -> None:
        sessions = registry(max_sessions=2)
        for name in ("a", "b"):
            await sessions.create_or_join(plan(name, 1))
        with pytest.raises(Busy):
            await sessions.create_or_join(plan("c", 1))
        assert (await sessions.create_or_join(plan("a", 1)))[1] is False
        await sessions.remove("a")
        assert (await sessions.create_or_join(plan("c", 1)))[1] is True
        with pytest.raises(UnknownSession):
            sessions.get("a")

    asyncio.run(talk())


def test_parameters_of_all_sessions_are_counted() -> None:
    """Together they take what the server allows, and what a removed one took is free again."""

    async def talk() -> None:
        sessions = registry(max_bytes=1000)
        await sessions.create_or_join(plan("a", 150))
        with pytest.raises(Busy):
            await sessions.create_or_join(plan("b", 101))
        await sessions.create_or_join(plan("b", 100))
        assert sessions.parameter_bytes == 1000
        await sessions.remove("a")
        assert sessions.parameter_bytes == 400

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


def test_what_fits_a_session_fits_the_server() -> None:
    """A single request may be larger than the budget, as all the state of a large session is; others then wait."""
    sessions = registry(max_bytes=1000)
    with sessions.in_flight() as one, sessions.in_flight() as other:
        one(3000)
        with pytest.raises(Busy):
            other(1)


def test_a_server_that_is_full_says_when_to_come_again() -> None:
    """A body for which there is no room while others are on their way is answered 503, and is taken later."""
    parameters = (torch.zeros(1 << 20),)
    with running_server("--max-gib", str(6 * 2**20 / 2**30)) as server, RawClient(server.url) as raw:
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
    with running_server() as server, RawClient(server.url) as raw:
        free = raw.request("GET", "/v1/info").document["available_bytes"]
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
