"""Look for edits while something else is done: in a thread, while the gradients of a large step are sent.

Sending takes one CPU and comparing another, on the worker's machine as well as where the server is on the same one:
its receiving does not fill a CPU. The last byte of a request is sent when everything was compared. If something
differs the request ends before, which changes nothing on the server; the edit is sent, and the request begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Thread
from typing import final

from farstep.tensors.edits import Check


@final
class Edited(Exception):
    """Something differs; raised to end a request that has begun."""


@final
class BackgroundCompare:
    """Make comparisons in a thread; they may be stopped and gone on with.

    Args:
        checks: returns the comparisons; called in the thread. What they compare stays as it is meanwhile.
    """

    def __init__(self, checks: Callable[[], Sequence[Check]]) -> None:
        self._begin = checks
        self._checks: Sequence[Check] | None = None
        self._next = 0
        self._thread: Thread | None = None
        self._stopped = False
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin, or go on."""
        self._stopped = False
        self._thread = Thread(target=self._run, name="farstep-edits", daemon=True)
        self._thread.start()

    def glance(self) -> None:
        """Tell what has been found so far.

        Raises:
            Edited: something differs.
        """
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until everything has been compared.

        Raises:
            Edited: something differs.
        """
        self._join()
        self.glance()

    def stop(self) -> None:
        """End the thread, wherever it is."""
        self._stopped = True
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        try:
            if self._checks is None:
                self._checks = self._begin()
            while self._next < len(self._checks) and not self._stopped:
                if self._checks[self._next]():
                    raise Edited
                self._next += 1
        except BaseException as exc:
            self._error = exc
