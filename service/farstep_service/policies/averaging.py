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

    @property
    def buffers(self) -> FlatBuffers | None:
        """Return the average, None before the first step."""
        return self._buffers

    @property
    def nbytes(self) -> int:
        """Return its memory."""
        return self._buffers.nbytes if self._buffers else 0

    def adopt(self, buffers: FlatBuffers, device: torch.device) -> None:
        """Go on with an average from elsewhere, in its own memory if that is on the device."""
        moved = FlatBuffers(buffers.layout, device, zero=False).copy_(buffers) if buffers.device != device else buffers
        self._buffers = moved

    def write_(self, segments: Sequence[int], values: Buffers, parameters: Buffers) -> None:
        """Replace some segments of it; one that has not begun begins with the parameters for the others."""
        if self._buffers is None:
            self._buffers = FlatBuffers(parameters.layout, parameters.device, zero=False).copy_(parameters)
        self._buffers.copy_(values, segments)

    def update_(self, parameters: Buffers) -> None:
        """Take the parameters after a step into it."""
        layout = parameters.layout
        if self._buffers is None:
            self._buffers = FlatBuffers(layout, parameters.device, zero=False).copy_(parameters)
            return
        every = range(len(layout.segments))
        # Tensor by tensor, as torch does it: where a tensor ends decides how its last elements are rounded.
        averages, now = [self._buffers.segment(i) for i in every], [parameters.segment(i) for i in every]
        torch._foreach_lerp_(averages, now, 1 - self._decay)

    def grow(self, parameters: Buffers) -> None:
        """Take segments in that a session has grown by; their average begins with what they are."""
        if self._buffers is not None:
            before = len(self._buffers.layout.segments)
            grown = FlatBuffers(parameters.layout, parameters.device, zero=False).copy_(self._buffers, range(before))
            self._buffers = grown.copy_(parameters, range(before, len(parameters.layout.segments)))
