"""Processes that are started together, read line by line and ended together."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from farstep.errors import InvalidOption
from farstep_service.launch.children import Children, LineWritten, ProcessExited, children
from tests.support.launch.launching import alive, events_of, line_of

FOREVER = "import signal; print('here', flush=True); signal.pause()"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"


@pytest.fixture
def running() -> Iterator[Children]:
    """Yield a place to start processes from; signals to this process are not its events."""
    with children(signals=()) as started:
        yield started


def start(running: Children, name: str, code: str) -> int:
    """Start a process of Python code."""
    return running.start(name, [sys.executable, "-c", code], os.environ)


def test_lines_arrive_before_the_end(running: Children):
    """What a process prints arrives line by line, and then that it has ended."""
    start(running, "short", "print('one'); print('two')")
    events = events_of(running)
    assert [next(events) for _ in range(3)] == [
        LineWritten("short", "stdout", b"one"),
        LineWritten("short", "stdout", b"two"),
        ProcessExited("short", 0),
    ]


def test_an_exit_holds_the_last_line_of_the_standard_error(running: Children):
    """The exit has the last line of the standard error that is not blank, and the number of the signal."""
    start(running, "clumsy", "import sys; print('x', file=sys.stderr); sys.exit('the disk is full.\\n\\n')")
    events = events_of(running)
    exits = (event for event in events if isinstance(event, ProcessExited))
    assert next(exits) == ProcessExited("clumsy", 1, "the disk is full.")
    pid = start(running, "victim", FOREVER)
    assert line_of(events, "victim") == "here"
    os.kill(pid, signal.SIGKILL)
    assert next(exits) == ProcessExited("victim", -signal.SIGKILL)


def test_stopping_one_process_keeps_what_others_say(running: Children):
    """Events of other processes stay in order for the next wait; those of the stopped one are returned."""
    start(running, "server", FOREVER)
    events = events_of(running)
    assert line_of(events, "server") == "here"
    start(running, "other", "print('early'); print('late')")
    assert running.stop("server", within_s=30) == [ProcessExited("server", -signal.SIGTERM)]
    assert [next(events) for _ in range(3)] == [
        LineWritten("other", "stdout", b"early"),
        LineWritten("other", "stdout", b"late"),
        ProcessExited("other", 0),
    ]


LATE = """
import os, signal
def leave(number, frame):
    os.open({fifo!r}, os.O_WRONLY)  # waits for the reader
    os.read(os.open({other!r}, os.O_RDONLY), 1)
    raise SystemExit(0)
signal.signal(signal.SIGTERM, leave)
print("here", flush=True)
signal.pause()
"""


def test_events_that_come_while_another_process_stops_are_kept(running: Children, tmp_path: Path):
    """What a process says while another one takes its time to stop is there for the next wait."""
    fifo, other = str(tmp_path / "one"), str(tmp_path / "other")
    os.mkfifo(fifo)
    os.mkfifo(other)
    start(running, "server", LATE.format(fifo=fifo, other=other))
    events = events_of(running)
    assert line_of(events, "server") == "here"
    start(running, "other", f"open({fifo!r}); print('late', flush=True); open({other!r}, 'w').write('x')")
    assert running.stop("server", within_s=30) == [ProcessExited("server", 0)]
    assert [next(events), next(events)] == [LineWritten("other", "stdout", b"late"), ProcessExited("other", 0)]


def test_what_was_stopped_is_not_heard_of_again(running: Children):
    """The end of a process that was stopped, and replaced by one of the same name, is no event of the new one."""
    start(running, "server", FOREVER)
    running.stop("server", within_s=30)
    start(running, "server", "print('again')")
    events = events_of(running)
    assert [next(events), next(events)] == [LineWritten("server", "stdout", b"again"), ProcessExited("server", 0)]


def test_what_does_not_listen_is_killed(running: Children):
    """Stopping kills a process that ignores SIGTERM when its time is up; the name of none is no error."""
    pids = {}
    for name, code in (("mild", FOREVER), ("stubborn", STUBBORN)):
        pids[name] = start(running, name, code)
        assert line_of(events_of(running), name) == "here"
    stopped = running.stop("mild", "stubborn", "unknown", within_s=0.5)
    assert sorted((event.process, event.code) for event in stopped if isinstance(event, ProcessExited)) == [
        ("mild", -signal.SIGTERM),
        ("stubborn", -signal.SIGKILL),
    ]
    assert [alive(pid) for pid in pids.values()] == [False, False]


def test_a_command_that_cannot_run_is_refused(running: Children):
    """Arguments that are too long for the system are an error of ours that names the command."""
    with pytest.raises(InvalidOption, match="Cannot run"):
        running.start("long", [sys.executable, "-c", "#" * (1 << 22)], os.environ)
    assert running.running == []
