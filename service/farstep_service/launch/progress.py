"""The line of progress: which version the session is at, how fast it gets there, and where each worker stands.

digits  version 1,204  41/s  |  w0 trains  w1 waits at the barrier  w2 starts, 1 restart  w3 done
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, final

import httpx

from farstep.conversation import Conversation
from farstep.errors import FarstepError
from farstep_service.launch.restart_policy import RestartPolicy

EVERY_S = 1.0
"""How often the session is asked, and how long its answer may take."""


@final
class Asking(threading.Thread):
    """Ask the server for the session's page again and again, beside the loop, which must not wait for it."""

    def __init__(self, server: str, session: str, token: str | None) -> None:
        super().__init__(name="farstep-progress", daemon=True)
        self._place = (server, session, token)
        self._stopped = threading.Event()
        self._page: tuple[float, Mapping[str, Any]] | None = None
        self._before: tuple[float, int] | None = None

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()
        self.join()

    def text(self, course: RestartPolicy) -> str:
        """Return the line of progress as of the last answer."""
        page = self._page
        if page is None:
            return line(self._place[1], None, 0.0, course)
        when_s, document = page
        speed = 0.0
        if self._before is not None and when_s > self._before[0]:
            speed = (int(document["version"]) - self._before[1]) / (when_s - self._before[0])
        return line(self._place[1], document, speed, course)

    def run(self) -> None:
        """Ask until stopped."""
        server, session, token = self._place
        speaking = Conversation(server, token, read_timeout_s=EVERY_S)
        try:
            while not self._stopped.wait(EVERY_S):
                try:
                    found = speaking.control("GET", f"/v1/sessions/{session}", within_s=EVERY_S)
                except (FarstepError, httpx.TransportError):
                    continue  # there is no session as yet, or the server is away
                if self._page is not None:
                    self._before = (self._page[0], int(self._page[1]["version"]))
                self._page = (time.monotonic(), found)
        finally:
            speaking.close()


def line(session: str, page: Mapping[str, Any] | None, per_s: float, course: RestartPolicy) -> str:
    """Return the line of progress.

    Args:
        session: its name.
        page: what the server says about it, None as long as it is not there.
        per_s: versions in a second.
        course: where the processes are.
    """
    workers = page["workers"] if page else {}
    version = f"version {page['version']:,}  {per_s:.3g}/s" if page else "not there yet"
    states = "  ".join(f"{name} {_state(name, workers, course)}" for name in course.restarts)
    return f"{session}  {version}  |  {states}"


def _state(name: str, workers: Mapping[str, Any], course: RestartPolicy) -> str:
    restarts = course.restarts[name]
    if name not in course.running:
        code = course.codes[name]
        return "done" if not code else f"failed ({code})"
    there = workers.get(name)
    if there is None:
        state = "outside"
    elif there["waiting"]:
        state = "waits at the barrier"
    else:
        state = "trains" if there["live"] else "was not heard of for its lease"
    return state if not restarts else f"{state}, {restarts} restart{'s' if restarts > 1 else ''}"
