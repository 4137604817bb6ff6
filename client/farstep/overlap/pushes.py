"""The pushes of one worker that begin during the backward pass: one at a time, over the same memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor

from farstep.overlap.push import OTHERS, UNUSED, Overlapped, Send
from farstep.overlap.stage import Stage
from farstep.tensors import Encoder


@final
class Overlapping:
    """Begin the pushes of one worker early, one at a time."""

    def __init__(self) -> None:
        self._stage: Stage | None = None
        self._current: Overlapped | None = None
        self._last: Overlapped | None = None

    def begin(
        self,
        header: Mapping[str, Any],
        order: Sequence[int],
        parameters: Sequence[Tensor],
        encoder: Encoder,
        send: Send,
    ) -> Overlapped | None:
        """Begin a push, unless the thread of the one before is still at work.

        Args:
            header, order: see `Overlapped`.
            parameters: all of them.
            encoder: see `Stage`.
            send: sends it.
        """
        self.end(UNUSED)
        if self._last is not None and not self._last.over:
            return None
        if self._stage is None:
            self._stage = Stage(parameters, encoder)
        self._current = self._last = Overlapped(header, order, self._stage)
        self._current.start(send)
        return self._current

    def take(self) -> Overlapped | None:
        """Return the push that was begun, for the step that it is for."""
        taken, self._current = self._current, None
        return taken

    def end(self, why: str) -> None:
        """Give the push that was begun up, if there is one."""
        if (taken := self.take()) is not None:
            taken.end(why)

    def forget_(self) -> None:
        """Take other memory from the next push on: there are other parameters."""
        self.end(OTHERS)
        self._stage = None

    def close(self, timeout_s: float) -> None:
        """End for good, once the connections are closed."""
        self.end(UNUSED)
        if self._last is not None:
            self._last.join(timeout_s)
