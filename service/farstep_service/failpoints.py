"""Named places where a test ends the process at once, as SIGKILL would.

    FARSTEP_FAILPOINT=journal.append.written       the process ends when it first comes there
    FARSTEP_FAILPOINT=journal.append.written:3     when it comes there for the third time

The variable is read when the process first comes to a place. Without it, a call of `reached` costs a comparison.
Nothing is flushed and no handler runs (`os._exit`), and the exit status is that of a process killed with -9.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import cache
from typing import Final, Literal, final, get_args

VARIABLE: Final = "FARSTEP_FAILPOINT"
KILLED: Final = 137
"""The exit status that a shell shows for a process ended by SIGKILL."""

Name = Literal[
    "directory.remove.before",
    "directory.remove.renamed",
    "journal.append.after",
    "journal.append.before",
    "journal.append.written",
    "journal.begin.created",
    "journal.begin.mapped",
    "journal.begin.named",
    "journal.forget.after",
    "journal.forget.before",
    "journal.rotate",
    "journal.sync.after",
    "journal.sync.before",
    "session.create.after",
    "session.create.before",
    "session.rotate",
    "session.synced",
    "snapshot.forget",
    "snapshot.forgotten",
    "snapshot.manifest",
    "snapshot.named",
    "snapshot.renamed",
    "snapshot.state",
    "snapshot.synced",
    "snapshot.written",
]
"""Every place; a test compares these with the calls in the sources."""
NAMES: Final[tuple[Name, ...]] = get_args(Name)


@final
class Failpoint:
    """The place at which this process ends.

    Args:
        name: its name; empty for none.
        visits: which visit ends the process, from 1.
    """

    def __init__(self, name: str, visits: int) -> None:
        self.name = name
        self._left = visits
        self._lock = threading.Lock()

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Failpoint:
        """Return the one that an environment asks for.

        Raises:
            ValueError: there is no such place, or the visit is not a number from 1: the process would never end.
        """
        text = environment.get(VARIABLE, "")
        name, _, visit = text.partition(":")
        if text and (name not in NAMES or not (visit or "1").isdecimal() or not int(visit or "1")):
            raise ValueError(f"{VARIABLE}={text!r}: write NAME or NAME:VISIT, where NAME is one of {', '.join(NAMES)}")
        return cls(name, int(visit or "1"))

    def visit(self) -> bool:
        """Count a visit, and return whether it is the one that ends the process."""
        with self._lock:
            self._left -= 1
            return not self._left


@cache
def _failpoint() -> Failpoint:
    """Return that of this process; read late, since a process may be forked from one with another environment."""
    return Failpoint.of(os.environ)


def reached(name: Name) -> None:
    """End the process if this is the place and the visit that its environment names."""
    failpoint = _failpoint()
    if name == failpoint.name and failpoint.visit():
        os._exit(KILLED)
