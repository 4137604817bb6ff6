"""Which parameters the caller edited: found by their version counters and addresses, without reading a byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor


@final
class Edits:
    """Compare parameters with what they were when they were last seen.

    Args:
        parameters: the session's, in order.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.see_()

    def see_(self) -> None:
        """Remember the parameters as they are now."""
        self._seen = [(p._version, p.data_ptr()) for p in self._parameters]

    def found(self) -> list[int]:
        """Return the indices of those that are not as they were seen."""
        return [i for i, p in enumerate(self._parameters) if (p._version, p.data_ptr()) != self._seen[i]]
