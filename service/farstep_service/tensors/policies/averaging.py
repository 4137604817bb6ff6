"""The exponential moving average of a session's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch

from farstep_service.store import Buffers, FlatBuffers


@final
class Average:
    """The exponential moving average of a session's parameters.

    It begins with the first step, after which it is the parameters themselves, as `AveragedModel`'s first update is.

    Args:
        decay: how much of the average stays at each step.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._buffers: FlatBuffers | None = None
        self._begun = False

    @property
    def buffers(self) -> FlatBuffers | None:
        """Return the average, None before the first step."""
        return self._buffers if self._begun else None

    @property
    def nbytes(self) -> int:
        """Return its memory."""
        return self._buffers.nbytes if self._buffers else 0

    def adopt(self, buffers: FlatBuffers, device: torch.device) -> None:
        """Go on with an average from elsewhere, in its own memory if that is on the device."""
        moved = FlatBuffers(buffers.layout, device, zero=False).copy_(buffers) if buffers.device != device else buffers
        self._buffers, self._begun = moved, True

    def write_(self, segments: Sequence[int], values: Buffers, parameters: Buffers) -> None:
        """Replace some segments of it; one that has not begun begins with the parameters for the others."""
        own = self._memory(parameters)
        if not self._begun:
            own.copy_(parameters)
            self._begun = True
        own.copy_(values, segments)

    def prepare(self, parameters: Buffers) -> None:
        """Take the memory that it is going to need, while there is still nothing that would be half done without."""
        self._memory(parameters)

    def update_(self, parameters: Buffers) -> None:
        """Take the parameters after a step into it."""
        own = self._memory(parameters)
        if not self._begun:
            own.copy_(parameters)
            self._begun = True
            return
        every = range(len(parameters.layout.segments))
        # Tensor by tensor, as torch does it: where a tensor ends decides how its last elements are rounded.
        averages, now = [own.segment(i) for i in every], [parameters.segment(i) for i in every]
        torch._foreach_lerp_(averages, now, 1 - self._decay)

    def grown(self, parameters: Buffers) -> Average:
        """Return this average with the segments that a session grows by, which begins with what they are."""
        grown = Average(self._decay)
        if self._begun and self._buffers is not None:
            before, own = len(self._buffers.layout.segments), grown._memory(parameters)
            own.copy_(self._buffers, range(before)).copy_(parameters, range(before, len(parameters.layout.segments)))
            grown._begun = True
        return grown

    def _memory(self, parameters: Buffers) -> FlatBuffers:
        if self._buffers is None:
            self._buffers = FlatBuffers(parameters.layout, parameters.device, zero=False)
        return self._buffers
