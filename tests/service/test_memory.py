"""Memory of a server: parameters, twice while a version is held, state, and one staging buffer per push in flight."""

from __future__ import annotations

import resource
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import farstep
from farstep.conversation import FILE
from farstep.protocol import encode
from tests.support.service.answers import MSGPACK, half_sent, opened, read_answer, read_head
from tests.support.service.measured import MIB, SLACK, Process, sent
from tests.support.service.raw import RawClient, RawWorker, payload_of
from tests.support.service.servers import RunningServer

pytestmark = pytest.mark.alone  # how many threads take memory at once depends on who else runs

SIZE = 64 * MIB
PARAMETERS = tuple(torch.zeros(SIZE // 16) for _ in range(4))
ONES = tuple(torch.ones(SIZE // 16) for _ in range(4))
CONNECTION = 64 * 1024
"""What a connection and its answer may take."""


@pytest.fixture(scope="module")
def process(server: RunningServer, raw: RawClient) -> Process:
    """Return the process after all of its code has run once, the threads for large sessions included."""
    (warm,) = raw.begun("warm", parameters=(torch.zeros(400_000),))
    for _ in range(3):
        warm.push([torch.ones(400_000)])
        warm.pull()
    raw.request("DELETE", warm.path)
    return Process(server)


@pytest.fixture(scope="module")
def worker(server: RunningServer, raw: RawClient, process: Process) -> RawWorker:
    """Return the worker of a session of 64 MiB that has taken some steps."""
    own = raw.join("large", parameters=PARAMETERS)
    head = own.head(base=..., fields=["param"], initial=True)
    assert sent(server.url, "PUT", f"{own.path}/contents", head, PARAMETERS) == 200
    own.last = 1
    for _ in range(10):
        assert step(server, own) == 200
    return own


def step(server: RunningServer, worker: RawWorker, reply: str = "all", tensors: tuple[torch.Tensor, ...] = ONES) -> int:
    status = sent(server.url, "POST", f"{worker.path}/push", worker.head(reply=reply), tensors)
    worker.last += status == 200
    return status


@pytest.mark.promise(
    "A session takes its parameters and their state once; a second version only while somebody reads it.",
    area="memory",
)
def test_a_session_takes_its_parameters_and_their_state(process: Process, worker: RawWorker) -> None:
    """After steps of one worker: the parameters and one field of Adagrad's state, each once, and nothing else."""
    assert abs(process.settle(2 * SIZE + SLACK) - 2 * SIZE) <= SLACK
    page = worker.raw.request("GET", worker.path).document
    assert page["bytes"] == {"parameters": SIZE, "versions": 0, "state": SIZE, "waiting": 0}


@pytest.mark.promise(
    "A session takes its parameters and their state once; a second version only while somebody reads it.",
    area="memory",
)
def test_a_version_that_is_held_is_the_second_one(server: RunningServer, process: Process, worker: RawWorker) -> None:
    """A reader that takes his time costs the parameters once more, whatever the number of steps, and then no more."""
    with ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(opened(server.url, buffer_bytes=1 << 14))
            sock.sendall(f"GET {worker.path}/contents HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert sock.recv(1000)
        for _ in range(4):
            assert step(server, worker, "none") == 200
        assert abs(process.settle(3 * SIZE + SLACK) - 3 * SIZE) <= SLACK
        assert worker.raw.request("GET", worker.path).document["bytes"]["versions"] == SIZE
    for _ in range(10):
        assert step(server, worker, "none") == 200
    assert process.settle(2 * SIZE + SLACK) <= 2 * SIZE + SLACK
    assert worker.raw.request("GET", worker.path).document["bytes"]["versions"] == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_push_in_flight_takes_what_has_arrived(
    server: RunningServer, process: Process, worker: RawWorker, count: int
) -> None:
    """Pushes of which half has been sent take that half each; when the clients are gone all of it is given back."""
    pieces = encode(worker.head(), payload_of(ONES))
    body = b"".join(pieces)
    headers = {"Content-Type": MSGPACK, "Content-Length": str(len(body))}
    with ExitStack() as stack:
        for _ in range(count):
            path = f"{worker.path}/push"
            stack.enter_context(half_sent(server.url, "POST", path, headers, [memoryview(body)[: len(body) // 2]]))
        received = 2 * SIZE + count * SIZE // 2
        taken = process.settle(received + SLACK)
        assert taken <= received + SLACK
    assert process.settle(2 * SIZE + SLACK) <= 2 * SIZE + SLACK
    assert step(server, worker) == 200


@pytest.mark.promise("What is announced takes no memory; what has arrived does.", area="memory")
def test_a_header_alone_takes_nothing(server: RunningServer, process: Process, worker: RawWorker) -> None:
    """200 pushes that announce 64 MiB each and send their headers only take no memory for it."""
    pieces = encode(worker.head(), payload_of(ONES))
    size = sum(memoryview(each).nbytes for each in pieces)
    headers = {"Content-Type": MSGPACK, "Content-Length": str(size)}
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(half_sent(server.url, "POST", f"{worker.path}/push", headers, [pieces[0], bytes(5)]))
        assert worker.raw.request("GET", "/healthz").status == 200
        assert process.taken <= 2 * SIZE + 2 * SLACK
    assert process.settle(2 * SIZE + SLACK) <= 2 * SIZE + SLACK


def test_what_is_refused_is_given_back(server: RunningServer, process: Process, worker: RawWorker) -> None:
    """Bodies that are refused at their end, for their content or their form, leave no memory behind."""
    bad = (*ONES[:3], torch.full((SIZE // 16,), float("nan")))
    for _ in range(3):
        assert step(server, worker, tensors=bad) == 422
    for tail in (b"\xc4\x00", b"\xc0"):
        pieces = encode(worker.head(), payload_of(ONES))
        size = sum(memoryview(each).nbytes for each in pieces) + len(tail)
        headers = {"Content-Type": MSGPACK, "Content-Length": str(size)}
        for _ in range(2):
            with half_sent(server.url, "POST", f"{worker.path}/push", headers, [*pieces, tail]) as sock:
                assert read_answer(sock).status == 400
    assert process.settle(2 * SIZE + SLACK) <= 2 * SIZE + SLACK


def test_state_on_its_way_is_given_back(server: RunningServer, process: Process, worker: RawWorker) -> None:
    """Reading parameters and state, and putting them back, takes copies that go when the answer has been sent."""
    with half_sent(server.url, "GET", f"{worker.path}/contents?fields=param,sum,step", {}) as sock:
        status, missing = read_head(sock)
        assert status == 200
        assert missing > 2 * SIZE - MIB
        while missing > 0:
            missing -= len(sock.recv(MIB))
    head = worker.head(base=..., fields=["param", "sum"])
    assert sent(server.url, "PUT", f"{worker.path}/contents", head, (*ONES, *ONES)) == 200
    worker.last += 1
    for _ in range(10):
        assert step(server, worker, "none") == 200
    assert process.settle(2 * SIZE + SLACK) <= 2 * SIZE + SLACK


def test_a_file_takes_one_copy_on_its_way(
    server: RunningServer, process: Process, worker: RawWorker, tmp_path: Path
) -> None:
    """An export costs a copy of the session while it is sent, an import what has arrived; nothing is joined."""
    path, file = f"{worker.path}/file", tmp_path / "large.safetensors"
    with opened(server.url, buffer_bytes=1 << 14) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert sock.recv(1000)
        assert worker.raw.request("GET", "/healthz").status == 200
        assert process.taken <= 4 * SIZE + SLACK
    assert process.settle(2 * SIZE + SLACK) <= 2 * SIZE + SLACK
    farstep.export_session("large", file, server=server.url)
    assert abs(file.stat().st_size - 2 * SIZE) < MIB
    whole = memoryview(file.read_bytes())
    headers = {"Content-Type": FILE, "Content-Length": str(len(whole))}
    with half_sent(server.url, "PUT", "/v1/sessions/second/file", headers, [whole[: len(whole) // 2]]):
        assert process.settle(3 * SIZE + SLACK) <= 3 * SIZE + SLACK
    assert process.settle(2 * SIZE + SLACK) <= 2 * SIZE + SLACK
    farstep.import_session(file, name="second", server=server.url)
    assert process.settle(4 * SIZE + SLACK) <= 4 * SIZE + SLACK
    assert worker.raw.request("DELETE", "/v1/sessions/second").status == 204
    assert process.settle(2 * SIZE + SLACK) <= 2 * SIZE + SLACK


def test_a_session_that_is_removed_leaves_nothing(process: Process, worker: RawWorker) -> None:
    """Its parameters and its state go with it."""
    assert worker.raw.request("DELETE", worker.path).status == 204
    assert process.settle(SLACK) <= SLACK


@pytest.mark.promise("What is announced takes no memory; what has arrived does.", area="memory")
def test_a_thousand_claims_take_nothing(server: RunningServer, process: Process, raw: RawClient) -> None:
    """1,000 connections that claim a body of 1 GB for a session of 16 bytes cost what connections cost, once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    (small,) = raw.begun("small")
    headers = {"Content-Type": MSGPACK, "Content-Length": "1000000000"}
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    taken = [process.taken]
    try:
        for _ in range(3):
            with ExitStack() as stack:
                path = f"{small.path}/push"
                claims = [stack.enter_context(half_sent(server.url, "POST", path, headers)) for _ in range(1000)]
                assert {read_answer(each).code for each in claims} == {"limit_exceeded"}
                taken.append(process.taken)
                assert small.push([torch.ones(4)]).receipt["applied"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert taken[1] - taken[0] <= 1000 * CONNECTION
    assert taken[3] - taken[1] <= SLACK
