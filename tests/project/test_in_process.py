"""Tests of pure rooms are kept pure, and what `make fast` runs is there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.support.in_process import FILES, LONG, ROOMS, TESTS, Guard, is_fast, leads_to_fast


@pytest.fixture(scope="module")
def made() -> Guard:
    """Make a guard, which Python keeps for ever."""
    return Guard()


@pytest.fixture
def guard(made: Guard) -> Iterator[Guard]:
    """Arm the guard for the test."""
    made.arm()
    yield made
    made.disarm()


def test_processes_and_connections_are_refused_and_remembered(guard: Guard) -> None:
    """A program, a fork, a listener and a connection fail with the reason; what is tried is there afterwards."""
    with socket.socket() as sock:
        for attempt in (
            lambda: subprocess.run([sys.executable, "-c", ""], check=True),
            os.fork,
            lambda: sock.bind(("127.0.0.1", 0)),
            lambda: sock.connect(("127.0.0.1", 9)),
        ):
            with pytest.raises(RuntimeError, match="A test of a pure room"):
                attempt()
    tried = [each.partition("(")[0] for each in guard.disarm()]
    assert tried == ["subprocess.Popen", "os.fork", "socket.bind", "socket.connect"]


def test_what_stays_in_the_process_is_allowed(guard: Guard) -> None:
    """Threads and pairs of sockets are no processes, and other threads may belong to other tests."""
    left, right = socket.socketpair()
    left.send(b"x")
    assert right.recv(1) == b"x"
    left.close()
    right.close()
    listening: list[socket.socket] = []
    other = threading.Thread(target=lambda: listening.append(socket.create_server(("127.0.0.1", 0))))
    other.start()
    other.join()
    listening[0].close()
    assert guard.disarm() == []


def test_a_guard_that_is_not_armed_does_nothing(made: Guard) -> None:
    """Tests of other rooms start what they like."""
    assert subprocess.run([sys.executable, "-c", ""], check=True).returncode == 0
    made.arm()
    assert made.disarm() == []


def test_every_test_of_a_pure_room_is_watched(request: pytest.FixtureRequest) -> None:
    """The files that are named exist, and paths are told apart."""
    assert all((TESTS / room).is_dir() for room in ROOMS)
    assert all((TESTS / name).is_file() for name in (*FILES, *LONG))
    assert is_fast(TESTS / "wire" / "test_header.py")
    assert is_fast(TESTS / FILES[0])
    assert not is_fast(TESTS / LONG[0])
    assert not is_fast(TESTS / "service" / "test_start.py")
    assert not is_fast(request.config.rootpath / "setup.py")
    ways = [TESTS, TESTS.parent, TESTS / "wire", TESTS / "launch", TESTS / "attack", TESTS.parent / "client"]
    assert [leads_to_fast(each) for each in ways] == [True, True, True, True, False, False]
