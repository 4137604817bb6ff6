"""Launches in processes of their own, and what their workers say."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farstep_service.launch.children import Children, Event, LineWritten

NO_SERVER = ("--server", "http://127.0.0.1:9")
LIMIT_S = 60.0


class Gone:
    """Notice the end of a process that is not a child."""

    def __init__(self, pid: int) -> None:
        self._fd = os.pidfd_open(pid)

    def __call__(self) -> bool:
        """Return whether it has ended, after waiting for that."""
        ready, _, _ = select.select([self._fd], [], [], LIMIT_S)
        os.close(self._fd)
        return bool(ready)


@contextmanager
def launching(*arguments: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run `farstep launch` beside the test."""
    with subprocess.Popen(
        [sys.executable, "-m", "farstep_service", "launch", *arguments],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def events_of(children: Children) -> Iterator[Event]:
    """Yield the events of processes for ever; the test fails if none comes within the limit."""
    heard = time.monotonic()
    while (left_s := heard + LIMIT_S - time.monotonic()) > 0:
        for event in children.wait(left_s):
            heard = time.monotonic()
            yield event
    raise AssertionError(f"nothing was heard of {children.running}")


def line_of(events: Iterator[Event], name: str) -> str:
    """Return the next line that a process writes to its standard output; events before it are dropped."""
    for event in events:
        if isinstance(event, LineWritten) and (event.process, event.stream) == (name, "stdout"):
            return event.line.decode()
    raise AssertionError("unreachable")


def alive(pid: int) -> bool:
    """Return whether a process has not been reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def watcher_of(launch: int) -> int:
    """Return the process that outlives a launch for a moment, to leave nothing behind."""
    children = Path(f"/proc/{launch}/task/{launch}/children").read_text().split()
    (watcher,) = (int(pid) for pid in children if b"\0watch\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return watcher


def heard(process: subprocess.Popen[str], *wanted: str) -> None:
    """Read the standard output until all these lines were there."""
    assert process.stdout is not None
    missing = set(wanted)
    for text in process.stdout:
        missing.discard(text.rstrip("\n"))
        if not missing:
            return
    raise AssertionError(f"never said: {missing}")


def said(text: str, name: str) -> list[str]:
    """Return what one process wrote."""
    split = [line.partition(" | ") for line in text.splitlines()]
    return [line for who, _, line in split if who.rstrip() == name]
