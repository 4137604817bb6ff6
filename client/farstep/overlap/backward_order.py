"""A prediction of the next step's gradients and of when each is final: as in the step before.

A backward pass reports each parameter's gradient, but not whether another pass will add to it, nor which parameters it
leaves out. Training loops repeat themselves, so the prediction is the step before:

    a parameter's last report of a step     as many as there were in the step before; further ones come too late
    the order of the gradients              that of the last reports
    which there are                         those that the step before pushed

A push begun on a wrong prediction is sent again, so after two wrong ones in a row there are none for `PAUSE_STEPS`.

Pure: no tensors, no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Literal, final

WRONG_IN_A_ROW: Final = 2
PAUSE_STEPS: Final = 100

Report = Literal["early", "last", "late"]
"""Of a gradient: more will be added or none was expected; it is final; it was taken for final before."""
STREAMED: Final = "streamed"


@final
class BackwardOrder:
    """Predict each step of one optimizer from the one before."""

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
        """Record that a gradient was accumulated."""
        count = self._reported.pop(index, 0) + 1
        self._reported[index] = count  # behind the others
        expected = self._expected.get(index, 0)
        if self._pause or count < expected or not expected:
            return "early"
        return "last" if count == expected else "late"

    def stepped(self, present: Collection[int], outcome: str) -> bool:
        """Record a step; return whether streaming is paused from now on.

        Args:
            present: the parameters whose gradients were pushed, if those may be streamed next time.
            outcome: `STREAMED`, or why a stream was given up, or "" without a stream.
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
