"""The memory budget of one server: what sessions hold and requests are about to take, against one limit.

    held        parameters, versions, state, averages, rounds that wait, memory that workers share: what is there, not
                what was announced, so that a session without contents counts nothing
    in flight   bodies on their way in, the gradients of pushes that wait, copies on their way out

Code that is about to allocate memory asks here first. A request that does not fit is refused before anything changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, final

from farstep.errors import Busy, LimitExceeded
from farstep_service.plan import Plan

UNBOUNDED = 2**63


@final
class MemoryBudget:
    """The memory of one server.

    Args:
        limit_bytes: the limit.

    Attributes:
        held_bytes: the memory of sessions.
        in_flight_bytes: the memory of requests.
    """

    def __init__(self, limit_bytes: int = UNBOUNDED) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.in_flight_bytes = 0

    def has(self, nbytes: int) -> bool:
        """Return whether `nbytes` more fit."""
        return self.held_bytes + self.in_flight_bytes + nbytes <= self.limit_bytes

    def check(self, nbytes: int) -> None:
        """Refuse a request that does not fit.

        Raises:
            LimitExceeded: it exceeds the whole limit, so waiting would not help.
            Busy: naming the requested and the available bytes.
        """
        if nbytes > self.limit_bytes:
            raise LimitExceeded(
                f"This takes {nbytes} bytes, and the server may use {self.limit_bytes} for all its sessions.",
                remedy="--max-gib says how much there may be.",
                limit=self.limit_bytes,
                asked=nbytes,
            )
        if not self.has(nbytes):
            there = max(0, self.limit_bytes - self.held_bytes - self.in_flight_bytes)
            raise Busy(
                f"The sessions here take {self.held_bytes} bytes and requests {self.in_flight_bytes}; there is no room "
                f"for {nbytes} more.",
                remedy="Try again shortly, or remove a session that is done; --max-gib says how much there may be.",
                limit=self.limit_bytes,
                asked=nbytes,
                available=there,
            )

    def in_flight(self) -> InFlight:
        """Return the account of one request, open until its answer ends."""
        return InFlight(self)


@final
class InFlight:
    """Account for the memory of one request; a context manager, whose value is called before memory is taken."""

    __slots__ = ("_budget", "_taken")

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._taken = 0

    def __call__(self, nbytes: int) -> None:
        """Take so many bytes; raise `Busy` if they exceed the budget."""
        budget = self._budget
        if nbytes > budget.limit_bytes - budget.held_bytes - budget.in_flight_bytes:
            budget.check(nbytes)
        budget.in_flight_bytes += nbytes
        self._taken += nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._budget.in_flight_bytes -= self._taken


def any_size(plan: Plan, nbytes: int) -> None:
    """Accept any size of a session."""


@final
class SessionMemory:
    """The account of one session in the memory budget.

    Args:
        budget: the server's.
        size: called before the session of a plan grows by a number of bytes; raises if it would be too large.

    Attributes:
        growing: the bytes by which its parameters are growing now.
    """

    def __init__(self, budget: MemoryBudget | None = None, size: Callable[[Plan, int], None] = any_size) -> None:
        self._budget = budget or MemoryBudget()
        self._size = size
        self._held = 0
        self.growing = 0

    def check_growth(self, plan: Plan, nbytes: int) -> None:
        """Refuse to grow the session's parameters by `nbytes` if they would not fit or be too large."""
        self._size(plan, nbytes)
        self._budget.check(nbytes)

    def expect(
        self, plan: Plan, growing: int, coming: int, give_way: Callable[[], bool], held: Callable[[], int]
    ) -> None:
        """Count what a write is about to take; `settle` follows, whatever becomes of it.

        Args:
            plan: the session's.
            growing: bytes of new parameters, which are already arriving.
            coming: other bytes that it may take.
            give_way: frees memory that the session can do without; returns False if it has none.
            held: returns what the session holds.
        """
        if growing:
            self._size(plan, growing)
        while not self._budget.has(coming):
            if not give_way():
                self._budget.check(coming)
            self.note(held())
        self.growing = growing
        if coming:
            self.note(self._held + coming)

    def settle(self, held: int) -> None:
        """Note what the session holds after a write."""
        self.growing = 0
        self.note(held)

    def note(self, nbytes: int) -> None:
        """Record the memory that the session holds now."""
        self._budget.held_bytes += nbytes - self._held
        self._held = nbytes
