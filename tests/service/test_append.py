"""Sessions that grow, over HTTP: the exactly-once table, what others are told, budgets, and bodies that are wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from farstep.errors import Busy, LimitExceeded, OptionsDiffer
from farstep.protocol import encode
from farstep.protocol.growth import AppendHead, NewParameter
from farstep.protocol.messages import PutHead, WriteName
from farstep_service.layout import SegmentSpec
from farstep_service.plan import Plan
from farstep_service.sessions import Actor
from farstep_service.sessions.registry import Registry
from farstep_service.settings import Settings
from tests.support.service.answers import MSGPACK, half_sent
from tests.support.service.raw import RawClient, RawWorker, gradient, specs, tensors_of
from tests.support.service.servers import RunningServer

PARAMETERS = (torch.linspace(-1, 1, 12).view(3, 4), torch.ones(5, dtype=torch.float64))
LATE = {"late.w": torch.linspace(-1, 1, 6).view(2, 3), "late.z": torch.tensor([1 + 2j, -1j])}
EVERYTHING = (*PARAMETERS, *LATE.values())


@pytest.fixture
def workers(raw: RawClient, request: pytest.FixtureRequest) -> Iterator[list[RawWorker]]:
    """Return the two workers of a session of this test's own."""
    name = str(abs(hash(request.node.name)))
    yield raw.begun(name, "w0", "w1", parameters=PARAMETERS)
    raw.request("DELETE", f"/v1/sessions/{name}")


def parameters_of(worker: RawWorker) -> list[torch.Tensor]:
    worker.parameters = list(EVERYTHING)
    return worker.pull()[1]


def segments(worker: RawWorker) -> int:
    return int(worker.raw.request("GET", worker.path).document["segments"])


# -- growing ---------------------------------------------------------------------------------------------------------


def test_a_session_grows(workers: list[RawWorker]) -> None:
    """The answer is the receipt without a payload; contents, listing and state have the new parameters."""
    worker = workers[0]
    answer = worker.append(LATE)
    assert (answer.receipt["version"], answer.receipt["base"], answer.receipt["applied"]) == (1, 0, True)
    assert (answer.header["version"], answer.header["segments"], answer.payload) == (1, [], b"")
    assert all(map(torch.equal, parameters_of(worker), EVERYTHING))
    document = worker.raw.request("GET", worker.path).document
    assert (document["segments"], document["parameters"]) == (4, 25)
    assert [group["lr"] for group in document["groups"]] == [0.1, 0.3]
    pushed = worker.push(gradient(1, EVERYTHING))
    assert (pushed.receipt["version"], pushed.header["count"]) == (2, 4)
    tensors = [each.clone() for each in EVERYTHING]
    groups = [{"params": tensors[:2], "lr": 0.1}, {"params": tensors[2:], "lr": 0.3}]
    optimizer = torch.optim.Adagrad(groups, foreach=False)
    for parameter, own in zip(tensors, gradient(1, EVERYTHING), strict=True):
        parameter.grad = own
    optimizer.step()
    assert all(map(torch.equal, tensors_of(pushed.payload, EVERYTHING), tensors))


def test_a_retry_gets_the_original_receipt(workers: list[RawWorker]) -> None:
    """Sent again at once and after later steps, the group is there once."""
    worker = workers[0]
    first = worker.append(LATE)
    for _ in range(2):
        again = worker.append(LATE, seq=2)
        assert (again.header["duplicate"], again.receipt) == (True, first.receipt)
        worker.push(gradient(1, EVERYTHING))
    assert (worker.version, segments(worker)) == (3, 4)


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"seq": 2, "options": {"lr": 0.4}}, 422, "idempotency_mismatch"),
        ({"seq": 4}, 409, "sequence_gap"),
        ({"epoch": 2}, 409, "fenced"),
        ({"worker": "nobody"}, 409, "fenced"),
        ({"incarnation": "0" * 32}, 410, "session_lost"),
    ],
)
def test_a_group_that_is_not_next_is_refused(
    workers: list[RawWorker], changes: dict[str, object], status: int, code: str
) -> None:
    """Other content, a gap, another epoch, another life of the session: refused, and nothing has changed."""
    worker = workers[0]
    worker.append(LATE)
    answer = worker.append(LATE, **changes)
    assert (answer.status, answer.code) == (status, code)
    assert (worker.version, segments(worker)) == (1, 4)
    assert worker.push(gradient(1, EVERYTHING)).status == 200


@pytest.mark.promise("A param group is added once, whatever the network does.", area="exactly once")
def test_many_retries_at_once_are_one_group(workers: list[RawWorker], raw: RawClient) -> None:
    """The same message on eight connections at once: one version more, one receipt for all."""
    worker = workers[0]
    head, payload = worker.group(LATE)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: raw.message("POST", f"{worker.path}/groups", head, payload), range(8)))
    assert [answer.status for answer in answers] == [200] * 8
    assert all(answer.receipt == answers[0].receipt for answer in answers)
    assert sorted(answer.header["duplicate"] for answer in answers) == [False] + [True] * 7
    assert (worker.version, segments(worker)) == (1, 4)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_body_that_is_cut_off_changes_nothing(server: RunningServer, workers: list[RawWorker], share: float) -> None:
    """A client that dies while it sends leaves no trace, and the same message, sent whole, is taken."""
    worker = workers[0]
    body = b"".join(encode(*worker.group(LATE)))
    headers = {"Content-Type": MSGPACK, "Content-Length": str(len(body))}
    with half_sent(server.url, "POST", f"{worker.path}/groups", headers, [body[: int(share * len(body))]]):
        pass
    assert worker.append(LATE).header["duplicate"] is False
    assert (worker.version, segments(worker)) == (1, 4)


# -- the other workers -----------------------------------------------------------------------------------------------


def test_others_are_told_and_join_in(workers: list[RawWorker]) -> None:
    """A worker that lags is told who added what; adding the same group gives it every parameter of now."""
    w0, w1 = workers
    w0.append(LATE)
    w0.push(gradient(1, EVERYTHING))
    refused = w1.push(gradient(2, PARAMETERS))
    assert (refused.status, refused.code) == (409, "fenced")
    assert "Worker 'w0' added param group 1" in refused.document["detail"]
    answer = w1.append({key: torch.zeros_like(each) for key, each in LATE.items()})
    assert (answer.receipt["applied"], answer.header["version"]) == (False, 2)
    assert all(map(torch.equal, tensors_of(answer.payload, EVERYTHING), parameters_of(w0)))
    assert w1.push(gradient(2, EVERYTHING)).receipt["version"] == 3


def test_a_worker_that_lags_by_two_gets_what_it_knows(workers: list[RawWorker]) -> None:
    """While a group is still missing the answer holds the segments of those that the worker has by now."""
    w0, w1 = workers
    w0.append(LATE)
    w0.append({"more": torch.ones(7)}, group=2)
    answer = w1.append(LATE)
    assert (answer.header["segments"], answer.header["count"]) == ([0, 4], 5)
    assert all(map(torch.equal, tensors_of(answer.payload, EVERYTHING), EVERYTHING))
    assert w1.push(gradient(1, EVERYTHING)).code == "fenced"
    assert w1.append({"more": torch.ones(7)}, group=2).receipt["applied"] is False
    assert w1.push(gradient(1, (*EVERYTHING, torch.ones(7)))).receipt["version"] == 3


def test_a_retry_of_a_push_from_before_is_answered_as_it_was(workers: list[RawWorker]) -> None:
    """A push whose answer was lost, once more after the session grew: its receipt, and the segments it knew."""
    w0, w1 = workers
    first = w1.push(gradient(1, PARAMETERS))
    w0.append(LATE)
    again = w1.push(gradient(1, PARAMETERS), seq=1)
    assert (again.header["duplicate"], again.receipt) == (True, first.receipt)
    assert (again.header["segments"], again.header["count"], again.header["version"]) == ([0, 2], 4, 2)
    assert all(map(torch.equal, tensors_of(again.payload, PARAMETERS), parameters_of(w0)))
    changed = w1.push(gradient(1, PARAMETERS), seq=1, reply="changed", have=1)
    assert changed.code == "idempotency_mismatch"


def test_another_group_in_its_place_is_refused(workers: list[RawWorker]) -> None:
    """A second worker with other options or shapes is told what differs, before its body is read."""
    w0, w1 = workers
    w0.append(LATE)
    for changes in ({"options": {"lr": 0.4}}, {"parameters": [["late.w", [3, 2], "float32"]]}):
        answer = w1.append(LATE, **changes)
        assert (answer.status, answer.code) == (409, "options_differ")
        assert "has a param group 1, but" in answer.document["detail"]
    assert w1.append(LATE).receipt["applied"] is False


def test_a_push_that_waits_at_the_barrier_is_answered(raw: RawClient) -> None:
    """In a sync session the one who waits gets 409 fenced when the session grows, and both go on with the group."""
    w0, w1 = raw.begun("growing-barrier", "w0", "w1", parameters=PARAMETERS, consistency={"mode": "sync", "workers": 2})
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(w0.push, gradient(1, PARAMETERS))
        while not raw.request("GET", f"{w0.path}/workers/w0").document["waiting"]:
            pass
        assert w1.append(LATE).status == 200
        assert (waiting.result().status, waiting.result().code) == (409, "fenced")
        assert w0.append(LATE).receipt["applied"] is False
        answers = list(pool.map(lambda worker: worker.push(gradient(1, EVERYTHING)), (w0, w1)))
    assert [answer.receipt["contributors"] for answer in answers] == [["w0", "w1"]] * 2
    assert w0.version == 2


def test_joining_needs_all_groups(workers: list[RawWorker], raw: RawClient) -> None:
    """A worker that joins later names every group; one that names the old ones is told what it lacks."""
    w0, _ = workers
    w0.append(LATE)
    every = specs(*PARAMETERS) + specs(*LATE.values(), names=[*LATE], group=1)
    joined = raw.join(w0.session, "w2", EVERYTHING, segments=every, groups=[{"lr": 0.1}, {"lr": 0.3}])
    assert joined.push(gradient(1, EVERYTHING)).status == 200
    document = {"name": w0.session, "worker": "w3", "optimizer": "Adagrad", "kernel": "reference"}
    answer = raw.json("POST", "/v1/sessions", {**document, "groups": [{"lr": 0.1}], "segments": specs(*PARAMETERS)})
    assert (answer.status, answer.code) == (409, "options_differ")
    assert "it has 4 parameters, not 2" in answer.document["detail"]


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"group": 2}, 422, "invalid_option"),
        ({"group": 0}, 409, "options_differ"),
        ({"group": -1}, 400, "invalid_request"),
        ({"group": 1.0}, 400, "invalid_request"),
        ({"group": ...}, 400, "invalid_request"),
        ({"options": {"momentum": 0.9}}, 422, "invalid_option"),
        ({"options": {"lr": -1.0}}, 422, "invalid_option"),
        ({"options": {"lr": float("nan")}}, 422, "invalid_option"),
        ({"options": [1]}, 400, "invalid_request"),
        ({"parameters": "w"}, 400, "invalid_request"),
        ({"parameters": [["late"]]}, 400, "invalid_request"),
        ({"parameters": [["late", 3, "float32"]]}, 400, "invalid_request"),
        ({"parameters": [["late", [-1], "float32"]]}, 422, "tensor_mismatch"),
        ({"parameters": [["late", ["3"], "float32"]]}, 422, "tensor_mismatch"),
        ({"parameters": [["late", [1] * 17, "float32"]]}, 413, "limit_exceeded"),
        ({"parameters": [["late", [3], "int64"]]}, 422, "tensor_mismatch"),
        ({"parameters": [["late", [3], 7]]}, 422, "tensor_mismatch"),
        ({"parameters": [[None, [3], "float32"]]}, 422, "tensor_mismatch"),
        ({"parameters": [["p0", [3], "float32"]]}, 422, "tensor_mismatch"),
        ({"parameters": [["late", [3], "float32"]] * 2}, 422, "tensor_mismatch"),
        ({"parameters": [["late", [2**50], "float32"]]}, 413, "limit_exceeded"),
        ({"parameters": [["late", [2**34], "float32"]]}, 413, "limit_exceeded"),
        ({"parameters": [["late", [2**30], "float32"]]}, 422, "tensor_mismatch"),
        ({"parameters": [["late", [1], "float32"]]}, 400, "invalid_request"),
        ({"parameters": ...}, 400, "invalid_request"),
        ({"surprise": 1}, 400, "invalid_request"),
        ({"v": 2}, 426, "protocol_mismatch"),
    ],
)
def test_a_group_that_cannot_be_changes_nothing(
    workers: list[RawWorker], changes: dict[str, Any], status: int, code: str
) -> None:
    """A header or a payload that is not right is refused with its code; both workers go on as before."""
    w0, w1 = workers
    answer = w0.append(LATE, **changes)
    assert (answer.status, answer.code) == (status, code)
    assert (w0.version, segments(w0)) == (0, 2)
    assert w1.push(gradient(1, PARAMETERS)).status == 200
    assert w0.append(LATE).receipt["version"] == 2


def test_a_payload_that_is_short_changes_nothing(workers: list[RawWorker], raw: RawClient) -> None:
    """A body without the last parameter ends early, and nothing has changed."""
    worker = workers[0]
    head, payload = worker.group(LATE)
    answer = raw.message("POST", f"{worker.path}/groups", head, payload[:-1])
    assert (answer.status, answer.code) == (400, "truncated")
    assert segments(worker) == 2


def test_a_session_without_parameters_cannot_grow(raw: RawClient) -> None:
    """Before its first parameters a session has nothing to add to."""
    worker = raw.join("growing-empty", parameters=PARAMETERS)
    answer = worker.append(LATE)
    assert (answer.status, answer.code) == (409, "not_initialised")


def test_other_methods_are_told(workers: list[RawWorker], raw: RawClient) -> None:
    """POST adds a group, PATCH changes options, GET lists them; there is nothing to PUT."""
    answer = raw.request("PUT", f"{workers[0].path}/groups")
    assert (answer.status, answer.code) == (405, "no_such_method")


# -- budgets and turns -----------------------------------------------------------------------------------------------


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


async def begun(sessions: Registry, name: str, elements: int) -> Actor:
    host, _ = await sessions.place(plan(name, elements))
    await host.join("w0", 1)
    head = PutHead(WriteName("w0", 1, 1), host.incarnation, ("param",), initial=True)
    await host.put(head, host.begin_put(head, 4 * elements), "first")
    return host


def group_of(host: Actor, elements: int, *, sequence: int = 2, group: int = 1) -> AppendHead:
    name = WriteName("w0", 1, sequence)
    return AppendHead(name, host.incarnation, group, {}, (NewParameter(f"late{group}", (elements,), "float32"),))


async def added(host: Actor, elements: int, *, sequence: int = 2, group: int = 1) -> bool:
    """Add a group and say whether it was seen before."""
    head = group_of(host, elements, sequence=sequence, group=group)
    return (await host.append(head, host.begin_append(head, 4 * elements), f"{sequence}")).duplicate


def test_a_session_that_grows_is_counted() -> None:
    """What a server allows for one session and for all together holds for groups that are added, and after a retry."""

    async def talk() -> None:
        sessions = Registry(Settings(max_session_bytes=800, max_bytes=2800), ThreadPoolExecutor(1))
        host, other = await begun(sessions, "a", 100), await begun(sessions, "b", 100)
        with pytest.raises(LimitExceeded) as large:
            await added(host, 101)
        assert large.value.limit == 800
        with pytest.raises(Busy) as full:
            await added(host, 51)
        assert full.value.limit == 2800
        assert not await added(host, 50)
        assert sessions.parameter_bytes == 1000
        assert await added(host, 50), "there is room for what is there already"
        with pytest.raises(Busy):
            await added(other, 1)
        await sessions.remove("a")
        assert sessions.parameter_bytes == 400
        assert not await added(other, 100)
        assert sessions.parameter_bytes == 800

    asyncio.run(talk())


def test_sessions_that_grow_at_once_share_the_room() -> None:
    """Of two sessions that grow at the same time where there is room for one, one is told that the server is full."""

    async def talk() -> None:
        sessions = Registry(Settings(max_bytes=2800), ThreadPoolExecutor(2))
        hosts = [await begun(sessions, name, 100) for name in ("a", "b")]
        heads = [group_of(host, 50) for host in hosts]
        intakes = [host.begin_append(head, 200) for host, head in zip(hosts, heads, strict=True)]
        asked = (host.append(head, intake, "x") for host, head, intake in zip(hosts, heads, intakes, strict=True))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers].count(Busy) == 1
        assert sessions.parameter_bytes == 1000

    asyncio.run(talk())


def test_a_worker_whose_plan_was_overtaken_does_not_join() -> None:
    """If the session grew between the comparison of plans and its turn, a worker is told; it does not lag unseen."""

    async def talk() -> None:
        sessions = Registry(Settings(), ThreadPoolExecutor(1))
        host = await begun(sessions, "a", 4)
        adding = asyncio.create_task(added(host, 4))
        await asyncio.sleep(0)
        with pytest.raises(OptionsDiffer, match="2 param groups by now, not 1"):
            await host.join("w1", 1)
        assert not await adding
        await host.join("w1", 2)

    asyncio.run(talk())


def test_a_view_stays_while_its_session_grows() -> None:
    """Parameters that are being sent are those of their version, whatever the session becomes meanwhile."""

    async def talk() -> None:
        sessions = Registry(Settings(), ThreadPoolExecutor(1))
        host = await begun(sessions, "a", 4)
        view = await host.reads.parameters()
        before = [bytes(each) for each in view.views]
        await added(host, 4)
        assert (view.version, view.count, [bytes(each) for each in view.views]) == (0, 1, before)
        view.release()
        later = await host.reads.parameters(since=0)
        assert (later.version, later.count, later.segments) == (1, 2, [1, 2])
        later.release()

    asyncio.run(talk())
