"""Room for a session to grow: asked for before memory is taken, and counted as taken while the session grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

from farstep_service.plan import Plan

Room = Callable[[Plan, int], None]
"""Called before a session of that plan grows by so many bytes; raises if there is no room for them."""


def unbounded(plan: Plan, nbytes: int) -> None:
    """Have room for anything."""


@final
class Growing:
    """Count what a session is about to grow by.

    Args:
        room: says whether it may.

    Attributes:
        nbytes: what it is growing by now.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self.nbytes = 0

    def check(self, plan: Plan, nbytes: int) -> None:
        """Refuse, in the words of `room`, what there is no room for."""
        self._room(plan, nbytes)

    @contextmanager
    def by(self, plan: Plan, nbytes: int) -> Iterator[None]:
        """Count bytes while the session grows by them, if there is room; 0 for a write that adds none."""
        if nbytes:
            self.check(plan, nbytes)
        self.nbytes = nbytes
        try:
            yield
        finally:
            self.nbytes = 0
