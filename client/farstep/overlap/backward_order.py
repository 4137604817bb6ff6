"""Which gradients the next step will have, and when each of them is final: as in the step before.

A backward pass says of each parameter that its gradient is there, but not whether another pass adds to it, nor which
parameters it will leave out. Training loops repeat themselves, so the step before tells:

    a parameter's last report of a step     as many as there were in the step before; further ones come too late
    the order of the gradients              that of the last reports
    which there are                         those that the step before pushed

A push that was begun on a wrong guess is sent again, so a loop that is guessed wrong twice in a row is left alone for
`PAUSE_STEPS`.

Pure: no tensors, no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Literal, final

WRONG_IN_A_ROW: Final = 2
PAUSE_STEPS: Final = 100

Report = Literal["early", "last", "late"]
"""Of a gradient: others will follow, or it is not expected at all; it is final; it had been taken for final before."""
STREAMED: Final = "streamed"


@final
class BackwardOrder:
    """Learn from each step of one optimizer what the next one will be."""

    def __init__(self) -> None:
        self._expected: dict[int, int] = {}
        self._reported: dict[int, int] = {}
        self._wrong = 0
        self._pause = 0

    @property
    def order(self) -> tuple[int, ...]:
        """Return the expected gradients, in the order in which they become final."""
        return tuple(self._expected)

    def reported(self, index: int) -> Report:
        """Take note that a gradient was accumulated."""
        count = self._reported.pop(index, 0) + 1
        self._reported[index] = count  # behind the others
        expected = self._expected.get(index, 0)
        if self._pause or count < expected or not expected:
            return "early"
        return "last" if count == expected else "late"

    def stepped(self, present: Collection[int], outcome: str) -> bool:
        """Take note of a step; return whether streaming has just been given up for a while.

        Args:
            present: the parameters whose gradients were pushed, if they may be streamed the next time.
            outcome: `STREAMED`, or why a stream was given up, or "" if there was none.
        """
        reported, self._reported = self._reported, {}
        known = {index: count for index, count in reported.items() if index in present}
        self._expected = known if len(known) == len(present) else {}
        if not outcome:
            self._pause = max(0, self._pause - 1)
            return False
        self._wrong = 0 if outcome == STREAMED else self._wrong + 1
        if self._wrong < WRONG_IN_A_ROW:
            return False
        self._pause = PAUSE_STEPS
        return True
