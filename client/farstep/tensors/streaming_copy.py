"""An answer copied into the parameters part by part, while a cache has each part and the rest arrives.

    memory                  before    while it comes            complete     given up
    what the session had    old       old                       old          old
    where it arrives                  new, as far as it came    new
    parameters              old       new, as far as it came    new          old again, copied from what the session had

So an answer that is cut off leaves the model as it was, and a complete one is in it when its last byte arrives. This
requires parameters with the session's values, which were compared before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farstep.tensors.edits import is_plain


@dataclass(frozen=True, slots=True)
class _Part:
    """One parameter of the answer.

    Attributes:
        nbytes: the number of bytes that arrive.
        item: bytes of an arriving element.
        here, there: the addresses of the parameter and of its arrival; 0 if it is not copied in parts.
        widened: parameter and arrival, flat, if their dtypes differ.
    """

    nbytes: int
    item: int
    here: int
    there: int
    widened: tuple[Tensor, Tensor] | None

    def copy(self, start: int, stop: int) -> None:
        """Copy some of its elements, given as a range of bytes of the arrival."""
        if self.widened is not None:
            here, there = self.widened
            first, last = start // self.item, stop // self.item
            here[first:last].copy_(there[first:last])
        elif self.here:
            ctypes.memmove(self.here + start, self.there + start, stop - start)


@final
class StreamingCopy:
    """The copy of one answer.

    Args:
        parameters: all of them, in the session's order.
        arriving: the memory that receives them: contiguous, on the CPU.
    """

    def __init__(self, parameters: Sequence[Tensor], arriving: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._arriving = arriving
        self._parts = [_part(p, source) for p, source in zip(parameters, arriving, strict=True)]
        self._which = 0
        self._begins = 0
        self._copied = 0

    def advance(self, received_bytes: int) -> None:
        """Copy the bytes received since the last call; `received_bytes` is their total."""
        while self._which < len(self._parts):
            part = self._parts[self._which]
            ready = min(received_bytes - self._begins, part.nbytes)
            ready -= ready % part.item
            if ready > self._copied:
                part.copy(self._copied, ready)
                self._copied = ready
            if ready < part.nbytes:
                return
            self._which, self._begins, self._copied = self._which + 1, self._begins + part.nbytes, 0

    def finish(self) -> None:
        """Copy what could not be copied in parts, after everything has arrived, and notify autograd."""
        with torch.no_grad():
            for p, source, part in zip(self._parameters, self._arriving, self._parts, strict=True):
                if part.nbytes and not part.here:
                    p.copy_(source)
        torch.autograd.graph.increment_version([p for p in self._parameters if not p.is_inference()])

    def undo(self, before: Sequence[Tensor]) -> None:
        """Restore the parameters that have changed; autograd need not know."""
        for p, known, part in list(zip(self._parameters, before, self._parts, strict=True))[: self._which + 1]:
            if part.here:
                p.data.copy_(known)
        self._which = self._begins = self._copied = 0


def _part(parameter: Tensor, arriving: Tensor) -> _Part:
    if not is_plain(parameter) or not parameter.numel():
        return _Part(arriving.nbytes, arriving.element_size(), 0, 0, None)
    widened = None
    if parameter.dtype != arriving.dtype:
        widened = parameter.data.view(-1), arriving.view(-1)
    return _Part(arriving.nbytes, arriving.element_size(), parameter.data_ptr(), arriving.data_ptr(), widened)
