"""Bounded: every push is a step of its own, but no worker runs more than a number of steps ahead of the slowest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from farstep.errors import invalid_option
from farstep.protocol.consistency.mode import LARGEST, Mode, check_seconds


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Bounded(Mode):
    """Apply every push by itself, with bounded staleness (stale synchronous parallel, Ho et al. 2013).

    A push of a worker that has completed c steps is applied at once if c <= m + staleness, where m is the least number
    of steps that a live worker has completed. Otherwise it waits until the slowest worker catches up, leaves, or its
    lease runs out. If the deadline passes first, it is not applied, and the error names the workers it waited for. A
    joining worker begins at m.

    So among N live workers no gradient is applied that misses more than 2 * (staleness + 1) * (N - 1) steps. A push
    that misses more, because its worker's lease had run out, is not applied but answered with the present parameters
    (`last_step.applied` is false, `last_step.reason` "stale").

    Attributes:
        staleness: the number of steps that a worker may be ahead of the slowest when it pushes.
        deadline_s: seconds that a push may wait.

    Raises:
        InvalidOption: a staleness below 0, or a deadline that is not positive or beyond a week.
    """

    staleness: int
    deadline_s: float = 60.0

    mode: ClassVar[str] = "bounded"
    shown: ClassVar[str] = "farstep.Bounded(staleness=...)"

    def __post_init__(self) -> None:
        super(Bounded, self).__post_init__()
        if type(self.staleness) is not int or not 0 <= self.staleness <= LARGEST:
            raise invalid_option(
                f"Invalid staleness: {self.staleness!r:.80}. Must be an int from 0 to 2**53.", "staleness"
            )
        check_seconds("deadline_s", self.deadline_s)

    @property
    def alone(self) -> bool:
        """Return True."""
        return True

    @property
    def waits_for_others(self) -> bool:
        """Return True: workers that are ahead wait for the slowest."""
        return True

    @property
    def longest_wait_s(self) -> float:
        """Return the deadline."""
        return self.deadline_s

    def bound(self, workers: int) -> int:
        """Return the number of steps that a gradient may miss among this many live workers."""
        return 2 * (self.staleness + 1) * (workers - 1)
