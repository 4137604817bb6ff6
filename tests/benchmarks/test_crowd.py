"""Worker processes for benchmarks do what they are told, and what is read of a server's process is its own."""

from __future__ import annotations

import os

import pytest

from farstep.conversation import Conversation
from tests.benchmarks.bench_memory import memory_of
from tests.benchmarks.crowd import Task, cpu_s, crowd
from tests.support.loaded import running_module
from tests.support.service.servers import running_server


@pytest.mark.parametrize("sync", [False, True])
def test_a_crowd_takes_all_its_steps(sync: bool) -> None:
    """Two workers take their steps in one session, at the same time: the server counts each of them."""
    with (
        running_server(loaded=True) as server,
        crowd(Task(server.url, "shared", 2, sync, 1_000, 3, 5, "reference"), start=running_module) as ready,
    ):
        talk = Conversation(server.url, None)
        before_s, warm = cpu_s(server.pid), int(talk.control("GET", "/v1/sessions/shared")["version"])
        done = ready.go()
        assert [len(each) for each in done.steps_s] == [5, 5]
        assert max(map(sum, done.steps_s)) <= done.wall_s
        session = talk.control("GET", "/v1/sessions/shared")
        assert session["version"] - warm == (5 if sync else 10)
        assert cpu_s(server.pid) >= before_s > 0
        assert memory_of(server.pid, "VmHWM") >= memory_of(server.pid, "VmRSS") > 10**7
        talk.close()


def test_processor_seconds_are_those_of_all_threads() -> None:
    """What is read of this process agrees with what the operating system tells it, to some ticks."""
    times = os.times()
    assert cpu_s(os.getpid()) == pytest.approx(times.user + times.system, abs=0.5)


def test_a_crowd_that_cannot_begin_says_so() -> None:
    """Workers that find no server end, and whoever waits for them is told."""
    task = Task("ftp://nowhere", "shared", 1, False, 10, 1, 1, "reference")
    with pytest.raises(RuntimeError, match="did not get ready"), crowd(task):
        pytest.fail("nobody is ready")
