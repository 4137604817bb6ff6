"""Readers that are slow: steps never wait for them, and what they keep of a session has a budget."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from farstep.errors import SessionLost
from farstep.protocol import encode
from farstep_service.sessions.readers import FAIR_BYTES_PER_S, GRACE_S, Readers, ReadKind, ReadSlot
from tests.support.service.answers import MSGPACK, opened, read_answer, read_head
from tests.support.service.hosting import run
from tests.support.service.raw import RawClient, RawWorker, payload_of
from tests.support.service.servers import RunningServer

MIB = 2**20
SIZE = 16 * MIB  # more than sockets on their way take
ONES = (torch.ones(SIZE // 4),)
KINDS = {
    "parameters": "/contents",
    "parameters in 16 bits": "/contents?wire_parameters=bfloat16",
    "state": "/contents?fields=param,sum",
    "a file": "/file",
    "answers": "/push",
}


@contextmanager
def asking(server: RunningServer, worker: RawWorker, kind: str) -> Iterator[socket.socket]:
    """Ask, and read the beginning of nothing: the caller reads, or does not."""
    path = worker.path + KINDS[kind]
    pieces = encode(worker.head(), payload_of(ONES)) if kind == "answers" else []
    size = sum(memoryview(each).nbytes for each in pieces)
    body = f"Content-Type: {MSGPACK}\r\nContent-Length: {size}\r\n" if pieces else ""
    method = "POST" if pieces else "GET"
    with opened(server.url, buffer_bytes=1 << 14) as sock:
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: {server.url[7:]}\r\n{body}\r\n".encode())
        for each in pieces:
            sock.sendall(each)
        yield sock


def is_whole(sock: socket.socket, missing: int) -> bool:
    """Read the rest of an answer and return whether it came."""
    try:
        while missing > 0 and (chunk := sock.recv(MIB)):
            missing -= len(chunk)
    except ConnectionResetError:
        return False
    return missing == 0


def stepped(worker: RawWorker) -> float:
    """Take a step and return the seconds that it waited."""
    times = worker.push(ONES, reply="none").header["times"]
    return float(times["queue"] + times["barrier"])


def readers(worker: RawWorker) -> dict[str, int]:
    found = worker.raw.request("GET", worker.path).document["readers"]
    assert isinstance(found, dict)
    return found


@pytest.mark.promise(
    "A step never waits for slow readers; a reader that is cut off is never given part of a version for the whole.",
    area="reads",
)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_on_and_the_slowest_are_cut(server: RunningServer, raw: RawClient, kind: str) -> None:
    """Whatever it is that readers do not read, no step waits for them, and another reader gets what it asks for."""
    workers = raw.begun(f"slow-{kind.replace(' ', '-')}", *(f"w{i}" for i in range(9)), parameters=ONES)
    writer, *others = workers
    assert stepped(writer) < 0.5
    many = 4 if kind == "parameters in 16 bits" else 2  # which have half the size
    with ExitStack() as stack:
        stalled = []
        for other in others[:many]:
            sock = stack.enter_context(asking(server, other, kind))
            status, missing = read_head(sock)
            assert status == 200
            stalled.append((sock, missing))
            assert stepped(writer) < 0.5
        late = [stack.enter_context(asking(server, other, kind)) for other in others[many:]]
        while (page := readers(writer))["waiting"] < len(late) and page["cut"] == 0:
            assert stepped(writer) < 0.5
        for sock in late:
            answer = read_answer(sock)
            assert answer.status == 200
            assert len(answer.body) > SIZE // 2
        page = readers(writer)
        assert page["limit_bytes"] >= page["held_bytes"]
        assert [is_whole(sock, missing) for sock, missing in stalled].count(False) == page["cut"] >= 1
    assert stepped(writer) < 0.5
    assert raw.request("DELETE", writer.path).status == 204


def test_any_number_of_readers_keeps_two_versions(server: RunningServer, raw: RawClient) -> None:
    """Eight readers that begin after eight different steps keep two versions; those who wait get one together."""
    (writer,) = raw.begun("eight", parameters=ONES)
    with ExitStack() as stack:
        socks = []
        for count in range(8):
            assert stepped(writer) < 0.5
            socks.append(stack.enter_context(asking(server, writer, "parameters")))
            while (now := readers(writer))["readers"] + now["waiting"] + now["cut"] < count + 1:
                pass
            held = raw.request("GET", writer.path).document["bytes"]["versions"]
            assert held <= 3 * SIZE, "two for readers, and a spare one"
        versions = []
        for sock in socks:
            try:
                versions.append(read_answer(sock).header["version"])
            except (AssertionError, OSError):
                versions.append(-1)  # it was cut, since it had begun and took nothing while the others waited
    assert [*versions[:2]].count(-1) + len({*versions} - {-1}) <= 3
    assert -1 not in versions[2:]
    assert len({*versions[2:]}) == 1
    assert raw.request("DELETE", writer.path).status == 204


# -- the rules, by themselves ----------------------------------------------------------------------------------------


@dataclass
class Answer:
    """An answer on its way, taken as fast as a test says."""

    seconds: float = 0.0
    taken: int = 0
    cuts: list[Answer] = field(default_factory=list)

    def progress(self) -> tuple[float, int] | None:
        return self.seconds, self.taken

    def cut(self) -> None:
        self.cuts.append(self)


class Hall:
    """Readers of a session of 100 bytes, two of whose versions may be kept."""

    def __init__(self) -> None:
        self.readers = Readers(lambda _: 200, self._freed)
        self.freed: list[ReadKind] = []
        self.version = 0

    async def _freed(self, kind: ReadKind) -> None:
        self.freed.append(kind)
        self.readers.admit(kind)

    def enter(self, kind: ReadKind = "pull", outgoing: Answer | None = None) -> ReadSlot | None:
        return self.readers.enter(kind, self.version, 100, outgoing)

    def sat(self, kind: ReadKind = "pull", outgoing: Answer | None = None) -> ReadSlot:
        slot = self.enter(kind, outgoing)
        assert slot is not None
        return slot

    async def waiting(self) -> asyncio.Task[tuple[ReadSlot, int]]:
        """Begin to wait for a slot, which comes with the version that it is for."""

        def take() -> tuple[ReadSlot, int] | None:
            slot = self.enter()
            return None if slot is None else (slot, self.version)

        before = self.readers.page.waiting
        task = asyncio.create_task(self.readers.wait("pull", take, lambda taken: taken[0].release()))
        while self.readers.page.waiting == before:
            await asyncio.sleep(0)
        return task


def test_readers_of_a_version_count_once_and_kinds_do_not_wait_for_each_other() -> None:
    """A third version is too much for one kind of reader, and nothing to the others."""
    hall = Hall()
    slots = [hall.sat(), hall.sat()]
    hall.version = 1
    slots += [hall.sat(), hall.sat()]
    hall.version = 2
    assert hall.enter() is None
    slots += [hall.sat("answer"), hall.sat("copy")]
    assert (hall.readers.page.readers, hall.readers.page.held_bytes) == (6, 400)
    for slot in slots:
        slot.release()
        slot.release()
    assert (hall.readers.page.readers, hall.readers.page.held_bytes) == (0, 0)
    hall.sat()


def test_those_who_wait_get_one_version_in_their_order() -> None:
    """They enter when one version is given back, together; who comes later does not overtake them."""

    async def body() -> None:
        hall = Hall()
        first = hall.sat()
        hall.version = 1
        second = hall.sat()
        hall.version = 2
        tasks = [await hall.waiting() for _ in range(4)]
        tasks[1].cancel()
        hall.version = 7
        assert hall.enter() is None
        first.release()
        assert [(await task)[1] for task in (tasks[0], *tasks[2:])] == [7, 7, 7]
        assert hall.readers.page.held_bytes == 200
        second.release()
        for task in (tasks[0], *tasks[2:]):
            (await task)[0].release()
        assert hall.readers.page.readers == 0

    run(body)


@pytest.mark.parametrize(("rate", "cut"), [(0, True), (0.9, True), (1.1, False), (50, False)])
def test_a_reader_is_cut_if_it_is_slow_and_somebody_waits(rate: float, cut: bool) -> None:
    """Slow is what takes less than the fair rate since it was last looked at; before somebody waits, no one is cut."""

    async def body() -> None:
        hall, answer = Hall(), Answer(100.0, 1000 * MIB)
        first = hall.sat("pull", answer)
        hall.version = 1
        second = hall.sat()
        hall.version = 2
        hall.readers._budgets["pull"].watch()
        assert not answer.cuts
        task = await hall.waiting()
        assert not answer.cuts, "on the whole it was fast"
        answer.seconds, answer.taken = 100 + 2 * GRACE_S, 1000 * MIB + int(rate * 2 * GRACE_S * FAIR_BYTES_PER_S)
        hall.readers._budgets["pull"].watch()
        assert bool(answer.cuts) == cut
        assert hall.readers.page.cut == cut
        first.release()
        (await task)[0].release()
        second.release()
        hall.readers.close(lambda: SessionLost("gone"))

    run(body)


def test_a_session_that_ends_tells_those_who_wait() -> None:
    """They get its error, and not silence."""

    async def body() -> None:
        hall = Hall()
        slots = [hall.sat()]
        hall.version = 1
        slots.append(hall.sat())
        hall.version = 2
        task = await hall.waiting()
        hall.readers.close(lambda: SessionLost("gone"))
        with pytest.raises(SessionLost):
            await task
        assert hall.readers.page.waiting == 0

    run(body)
