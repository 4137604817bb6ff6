"""Workers that are killed or stopped in the middle of training, and the others, who go on.

Server and workers are processes. Nothing sleeps: workers say what became of each step, and the tests wait for that.
"""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from farstep.conversation import Conversation
from farstep.optim import SGD
from farstep.protocol.consistency import Bounded, Consistency, Sync
from tests.support.client import training_process
from tests.support.client.training_process import SLOTS, WORKERS
from tests.support.limits import Limit
from tests.support.service.servers import RunningServer, running_server

pytestmark = pytest.mark.alone

SAYS_WITHIN_S = 60.0
SLACK_S = 1.0
"""How long after the deadline everybody knows, by promise, on a machine that has time for all of them."""


PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload([training_process.__name__])  # where torch is imported, once for all workers


class Process:
    """A worker process; see `training_process`.

    Args:
        server: where it trains.
        session, name, mode: what it joins, as whom, and how.
        company: the processes that its steps depend on, the server first; it adds itself.

    Attributes:
        said: what it has said so far.
    """

    def __init__(self, server: RunningServer, session: str, name: str, mode: Consistency, company: list[int]) -> None:
        number = len(company) - 1
        self.name, self._company = name, company
        self.said: list[dict[str, Any]] = []
        self._pipe, theirs = PROCESSES.Pipe()
        self._read = b""
        arguments = (theirs, server.url, session, name, mode, number)
        self._process = PROCESSES.Process(target=training_process.train, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        company.append(self.pid)

    @property
    def pid(self) -> int:
        """Return its number."""
        assert self._process.pid is not None
        return self._process.pid

    def line(self, within_s: float = SAYS_WITHIN_S) -> dict[str, Any]:
        """Return the next thing it says."""
        limit = Limit(within_s, self._company)
        while b"\n" not in self._read:
            left_s = limit.left_s()
            ready, _, _ = select.select([self._pipe], [], [], left_s)
            assert ready or left_s, f"{self.name} said nothing for {within_s:g} s"
            self._read += self._chunk() if ready else b""
        first, _, self._read = self._read.partition(b"\n")
        said = json.loads(first)
        assert isinstance(said, dict)
        self.said.append(said)
        return said

    def _chunk(self) -> bytes:
        chunk = os.read(self._pipe.fileno(), 65536)
        assert chunk, f"{self.name} ended"
        return chunk

    def until(self, wanted: Callable[[dict[str, Any]], bool], within_s: float = SAYS_WITHIN_S) -> dict[str, Any]:
        """Return the first thing it says that is wanted; each must come within that time of the one before."""
        while not wanted(said := self.line(within_s)):
            pass
        return said

    def finish(self) -> None:
        """Let it end after its step, or find it killed, and hear what it still has to say."""
        with suppress(BrokenPipeError):
            os.write(self._pipe.fileno(), b"\n")
        *whole, _ = self._rest().split(b"\n")
        self.said += map(json.loads, whole)

    def last_version(self) -> int:
        """Return the version of the last step that a killed worker has said anything of."""
        self._read = self._rest()
        *whole, _ = self._read.split(b"\n")
        return max(json.loads(line).get("version", 0) for line in whole) if whole else 0

    def _rest(self) -> bytes:
        """Return what it says until it has ended."""
        read = self._read
        while chunk := os.read(self._pipe.fileno(), 65536):
            read += chunk
        return read

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        self._process.kill()
        self._process.join(30)

    def end(self) -> None:
        """Kill it, and close what it spoke through."""
        self.kill()
        self._pipe.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Run a server of our own: its sessions are full of dead workers."""
    with running_server(loaded=True) as running:
        yield running


@contextmanager
def training(server: RunningServer, session: str, mode: Consistency, names: Sequence[str]) -> Iterator[list[Process]]:
    """Run worker processes that have all joined and begun to step."""
    with ExitStack() as stack:
        processes: list[Process] = []
        company = [server.pid]
        for name in names:
            process = Process(server, session, name, mode, company)
            stack.callback(process.end)
            processes.append(process)
        for process in processes:
            process.until(lambda said: "version" in said)
        yield processes


def without(name: str) -> Callable[[dict[str, Any]], bool]:
    """Return what says that a step was taken without a worker."""
    return lambda said: "version" in said and said["reason"] == "" and name not in said["contributors"]


def with_(name: str) -> Callable[[dict[str, Any]], bool]:
    """Return what says that a step was taken with a worker."""
    return lambda said: name in said.get("contributors", ())


def version_without(name: str, server: RunningServer, session: str, others: Sequence[Process]) -> int:
    """Return a version of a session in which a worker is not live any more; the others are listened to meanwhile."""
    conversation = Conversation(server.url, None)
    try:
        while True:
            page = conversation.control("GET", f"/v1/sessions/{session}")
            if not page["workers"][name]["live"]:
                return int(page["version"])
            for other in others:
                other.line()
    finally:
        conversation.close()


LIVE = Sync(workers="live", deadline_s=30.0, lease_s=1.0)
AT_DEADLINE = Sync(workers="live", deadline_s=1.0, lease_s=60.0)
QUORUM = Sync(workers=3, quorum=2, deadline_s=30.0, lease_s=60.0)
FOLDED = Sync(workers=3, quorum=2, deadline_s=3.0, lease_s=1.0, late="fold")  # at the end the last one waits alone
BOUNDED = Bounded(staleness=1, deadline_s=30.0, lease_s=1.0)


@pytest.mark.promise(
    "A worker that is killed holds the others up for its lease or the deadline, and not longer.",
    area="consistency modes",
)
@pytest.mark.parametrize(
    ("mode", "longest_s"),
    [(LIVE, 1.0), (AT_DEADLINE, 1.0), (QUORUM, 0.0), (BOUNDED, 1.0)],
    ids=["lease", "deadline", "quorum", "bounded"],
)
def test_a_worker_that_is_killed_stops_nobody(
    server: RunningServer, mode: Consistency, longest_s: float, request: pytest.FixtureRequest
) -> None:
    """After kill -9 the survivors' next steps come within lease or deadline plus a second, and go on coming."""
    with training(server, f"kill-{mode.mode}-{longest_s}-{mode.lease_s}", mode, ("w0", "w1", "w2")) as (w0, w1, w2):
        w2.kill()
        last = w2.last_version()
        for survivor in (w0, w1):
            survivor.until(lambda said: said.get("version", 0) > last + 30, longest_s + SLACK_S)
            survivor.until(without("w2"), longest_s + SLACK_S)


@pytest.mark.promise(
    "A worker that was stopped beyond its lease takes part again, and its old gradient is not applied in silence.",
    area="consistency modes",
)
@pytest.mark.parametrize(
    ("mode", "reasons"),
    [(LIVE, {"", "late"}), (QUORUM, {"late"}), (BOUNDED, {"stale"})],
    ids=["lease", "quorum", "bounded"],
)
def test_a_worker_that_was_stopped_beyond_its_lease_takes_part_again(
    server: RunningServer, mode: Consistency, reasons: set[str]
) -> None:
    """SIGSTOP, the others go on, SIGCONT: its old gradient is not applied in silence, and its next ones count."""
    names, session = ("w0", "w1", "w2"), f"stop-{mode.mode}-{mode.lease_s}"
    with training(server, session, mode, names) as (w0, w1, w2):
        w2.send(signal.SIGSTOP)
        if mode is BOUNDED:  # where each step is one worker's, so that none tells of another
            last = version_without("w2", server, session, (w0, w1))
        else:
            last = w0.until(without("w2"), mode.lease_s + SLACK_S)["version"]
        for survivor in (w0, w1):
            survivor.until(lambda said: said.get("version", 0) > last + 30)
        w2.send(signal.SIGCONT)
        seen: set[str] = set()
        while not reasons & seen:
            seen.add(str(w2.line().get("reason")))
        assert seen <= {"", "late", "stale"}
        w2.until(with_("w2"))
        if mode is not BOUNDED:
            w0.until(with_("w2"))


@pytest.mark.promise(
    "With workers killed and connections cut at random, no acknowledged step is lost or counted twice.",
    area="exactly once",
)
@pytest.mark.parametrize(
    ("session", "mode"), [("count-live", LIVE), ("count-fold", FOLDED), ("count-bounded", BOUNDED)], ids=str
)
def test_what_was_answered_counts_once_and_what_was_not_at_most_once(
    server: RunningServer, session: str, mode: Consistency
) -> None:
    """One worker killed and one stopped for a while: the parameters hold each gradient that was said to be applied."""
    with training(server, session, mode, ("w0", "w1", "w2")) as crew:
        w0, w1, w2 = crew
        w2.kill()
        last = max(w0.line().get("version", 0), w1.line().get("version", 0))
        w1.send(signal.SIGSTOP)
        if mode is LIVE:  # where the one that is left goes on alone
            w0.until(lambda said: said.get("contributors") == ["w0"])
        w1.send(signal.SIGCONT)
        for survivor in (w0, w1):
            survivor.until(lambda said: said.get("version", 0) > last + 30)
        for each in crew:
            each.finish()
        counted = torch.zeros(WORKERS * SLOTS)
        for said in (said for each in crew for said in each.said if said.get("reason") == ""):
            counted[said["slot"]] += 1 / said["divisor"]
    parameter = torch.nn.Parameter(torch.zeros(WORKERS * SLOTS))
    late = SGD(
        [parameter], lr=1.0, server=server.url, session=session, worker="w3", kernel="reference", consistency=mode
    )
    unsaid = (-parameter.detach() - counted).reshape(WORKERS, SLOTS)
    torch.testing.assert_close(unsaid[[0, 1, 3]], torch.zeros(3, SLOTS), rtol=0.0, atol=1e-3)
    assert (unsaid[2] > 1e-3).sum() <= 1
    assert unsaid[2].min() > -1e-3
    assert unsaid[2].max() < 1 + 1e-3
    late.close()


@pytest.mark.promise(
    "When the deadline of a sync step passes, every waiting worker gets `BarrierTimeout`, and nothing is applied.",
    area="consistency modes",
)
def test_a_barrier_that_nobody_completes_ends_for_all_and_the_place_is_taken(server: RunningServer) -> None:
    """Plain sync, one of three killed: the others get one answer at the deadline, and a fourth takes the place."""
    mode = Sync(workers=3, deadline_s=1.0, lease_s=60.0)
    with training(server, "barrier", mode, ("w0", "w1", "w2")) as (w0, w1, w2):
        w2.kill()
        for survivor in (w0, w1):
            said = survivor.until(lambda said: "error" in said, mode.longest_wait_s + SLACK_S)
            assert said == {"error": "barrier_timeout"}
        fourth = Process(server, "barrier", "w3", mode, [server.pid, w0.pid, w1.pid])
        try:
            for each in (w0, w1, fourth):
                said = each.until(with_("w3"))
                assert said["contributors"] == ["w0", "w1", "w3"]
        finally:
            fourth.end()
