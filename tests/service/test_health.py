"""A server answers about its health while it is busy: receiving, applying and sending 200 MB."""

from __future__ import annotations

import http.client
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from farstep.protocol import encode
from tests.support.service.answers import MSGPACK, half_sent, read_head
from tests.support.service.raw import RawClient, RawWorker, payload_of
from tests.support.service.servers import RunningServer

pytestmark = pytest.mark.alone

ELEMENTS = 50_000_000
ROUNDS = 3
WITHIN_S = 0.1
PARAMETERS = (torch.zeros(ELEMENTS // 2), torch.zeros(ELEMENTS // 2))


@pytest.fixture(scope="module")
def worker(server: RunningServer) -> RawWorker:
    """Return the one worker of a session of 200 MB."""
    with RawClient(server.url) as raw:
        own = raw.join("busy", parameters=PARAMETERS)
    head = own.head(base=..., fields=["param"], initial=True)
    assert exchange(server.url, "PUT", f"{own.path}/contents", head, PARAMETERS) == 200
    own.last = 1
    return own


def exchange(url: str, method: str, path: str, head: dict[str, object], tensors: tuple[torch.Tensor, ...]) -> int:
    """Send a message and read its answer, without holding this process's interpreter up; return the status."""
    pieces = encode(head, payload_of(tensors))
    size = sum(memoryview(each).nbytes for each in pieces)
    with half_sent(url, method, path, {"Content-Type": MSGPACK, "Content-Length": str(size)}, pieces) as sock:
        status, missing = read_head(sock)
        scratch = memoryview(bytearray(1 << 20))
        while missing:
            count = sock.recv_into(scratch[: min(missing, len(scratch))])
            assert count
            missing -= count
    return status


def health_while(url: str, done: Callable[[], bool]) -> list[float]:
    """Return how long each answer took, in seconds, one asked for after the other."""
    took = []
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    while not done():
        began = time.perf_counter()
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.read() == b'{"status":"ok"}'
        took.append(time.perf_counter() - began)
    connection.close()
    return took


def judge(took: list[float]) -> None:
    """Hold the worst tenth of the answers to the promise: by their median, since other programs run here, too."""
    worst = sorted(took)[-max(1, len(took) // 10) :]
    middle_ms, worst_ms, most_ms = (
        1e3 * each for each in (statistics.median(took), statistics.median(worst), max(took))
    )
    said = f"{len(took)} answers, median {middle_ms:.1f} ms, worst tenth {worst_ms:.1f} ms, longest {most_ms:.1f} ms"
    print(said)  # shown by pytest -rP
    assert worst_ms < 1e3 * WITHIN_S, said


@pytest.mark.promise("`/healthz` is answered within 100 ms during a push of 200 MB.", area="limits")
def test_health_is_answered_during_a_large_push(server: RunningServer, worker: RawWorker) -> None:
    """While 200 MB of gradients are received, applied and answered with 200 MB, /healthz takes less than 100 ms."""

    def push() -> None:
        for _ in range(ROUNDS):
            head = worker.head(base=0)
            assert exchange(server.url, "POST", f"{worker.path}/push", head, PARAMETERS) == 200
            worker.last += 1

    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(push)
        took = health_while(server.url, pushing.done)
        pushing.result()
    judge(took)


def test_health_is_answered_while_a_version_is_copied(server: RunningServer, worker: RawWorker) -> None:
    """A push of one number makes 200 MB be copied when a slow reader holds the version; that blocks nobody either."""
    with RawClient(server.url) as raw:
        small = raw.join("busy-too", parameters=(torch.zeros(ELEMENTS), torch.zeros(1)))
    everything = (torch.zeros(ELEMENTS), torch.zeros(1))
    head = small.head(base=..., fields=["param"], initial=True)
    assert exchange(server.url, "PUT", f"{small.path}/contents", head, everything) == 200

    def push(reading: threading.Event) -> None:
        assert reading.wait(30)
        head = small.head(seq=2, segments=[1, 2], reply="none")
        assert exchange(server.url, "POST", f"{small.path}/push", head, (torch.ones(1),)) == 200

    reading = threading.Event()
    with ThreadPoolExecutor(1) as pool, half_sent(server.url, "GET", f"{small.path}/contents", {}) as sock:
        pushing: Future[None] = pool.submit(push, reading)
        assert sock.recv(1024)
        reading.set()
        took = health_while(server.url, pushing.done)
        pushing.result()
    judge(took)
    with RawClient(server.url) as raw:
        raw.request("DELETE", small.path)
