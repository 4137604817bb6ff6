"""The line of progress: the session's version, how fast it grows, and the state of each worker.

digits  version 1,204  41/s  |  w0 trains  w1 waits at the barrier  w2 starts, 1 restart  w3 done
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import httpx

from farstep.conversation import Conversation
from farstep.errors import FarstepError
from farstep_service.launch.restart_policy import RestartPolicy

EVERY_S = 1.0
"""Seconds between two requests, and the longest wait for an answer."""


@final
class SessionPoller(threading.Thread):
    """Ask the server for the session's state every second, in a thread, because the run's loop must not wait for it.

    Args:
        server: its URL.
        session: its name.
        token: the server's token.
    """

    def __init__(self, server: str, session: str, token: str | None) -> None:
        super().__init__(name="farstep-progress", daemon=True)
        self._session = session
        self._conversation = Conversation(server, token, read_timeout_s=EVERY_S)
        self._stopped = threading.Event()
        self._answer: tuple[float, Mapping[str, Any]] | None = None
        self._before: tuple[float, int] | None = None

    def text(self, policy: RestartPolicy) -> str:
        """Return the line of progress as of the last answer."""
        if self._answer is None:
            return line(self._session, None, 0.0, policy)
        when_s, state = self._answer
        speed = 0.0
        if self._before is not None and when_s > self._before[0]:
            speed = (int(state["version"]) - self._before[1]) / (when_s - self._before[0])
        return line(self._session, state, speed, policy)

    def run(self) -> None:
        """Ask until stopped."""
        try:
            while not self._stopped.wait(EVERY_S):
                try:
                    state = self._conversation.control("GET", f"/v1/sessions/{self._session}", within_s=EVERY_S)
                except (FarstepError, httpx.TransportError):
                    continue  # the session does not exist yet, or the server does not answer
                if self._answer is not None:
                    self._before = (self._answer[0], int(self._answer[1]["version"]))
                self._answer = (time.monotonic(), state)
        finally:
            self._conversation.close()

    def stop(self) -> None:
        """Stop asking, and wait for the thread's end."""
        self._stopped.set()
        self.join()


@contextmanager
def polling(server: str, session: str, token: str | None) -> Iterator[SessionPoller]:
    """Poll a session until the end of the block."""
    poller = SessionPoller(server, session, token)
    poller.start()
    try:
        yield poller
    finally:
        poller.stop()


def line(session: str, state: Mapping[str, Any] | None, per_s: float, policy: RestartPolicy) -> str:
    """Return the line of progress.

    Args:
        session: its name.
        state: the server's answer about it, None until the session exists.
        per_s: versions in a second.
        policy: knows which processes run, and how the others ended.
    """
    members = state["workers"] if state else {}
    version = f"version {state['version']:,}  {per_s:.3g}/s" if state else "not there yet"
    states = "  ".join(f"{name} {_state(name, members, policy)}" for name in policy.restarts)
    return f"{session}  {version}  |  {states}"


def _state(name: str, members: Mapping[str, Any], policy: RestartPolicy) -> str:
    restarts = policy.restarts[name]
    if name not in policy.running:
        code = policy.codes[name]
        return "done" if not code else f"failed ({code})"
    member = members.get(name)
    if member is None:
        state = "outside"
    elif member["waiting"]:
        state = "waits at the barrier"
    else:
        state = "trains" if member["live"] else "was not heard of for its lease"
    return state if not restarts else f"{state}, {restarts} restart{'s' if restarts > 1 else ''}"
