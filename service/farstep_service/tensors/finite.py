"""Whether numbers are finite: of memory that is there, of a sum, and of a body while it arrives.

A sum is finite unless a summand is not, or it overflows, so one pass over memory is enough mostly; only if the sum is
not finite is each number looked at. Of float16, whose sums overflow soon, the extremes are looked at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Final, final

import torch
from torch import Tensor

from farstep_service.store import Gradients, pieces

BLOCK: Final = 2**17
"""Elements that are looked at together one by one, so that temporary memory stays small."""
PIECE: Final = 2**15 - 2**10
"""Elements that are looked at together while more arrive: they are in a core's cache, and too few for torch to wake
other threads, which would be in the way of the event loop."""


def all_finite(span: Tensor) -> bool:
    """Return whether a flat tensor holds neither NaN nor Inf."""
    if span.dtype is torch.float16:
        return not span.numel() or all(math.isfinite(extreme.item()) for extreme in span.aminmax())
    if math.isfinite(span.sum().item()):
        return True
    return all(bool(torch.isfinite(block).all()) for block in torch.split(span.view(-1), BLOCK))


def copy_finite_(into: Tensor, source: Tensor) -> bool:
    """Copy a flat tensor and return whether the copy holds neither NaN nor Inf.

    Each block is looked at where it has been copied to, while a core's cache still has it: what the source becomes
    afterwards does not matter.
    """
    finite = True
    for block, its in zip(torch.split(into, BLOCK), torch.split(source, BLOCK), strict=True):
        block.copy_(its)
        finite = finite and all_finite(block)
    return finite


def first_nonfinite_in(gradients: Gradients) -> int | None:
    """Return the first segment whose gradient holds NaN or Inf, None if all are finite.

    Several finite gradients may have a sum that is not.
    """
    dense = gradients.dense()
    for (span,) in pieces(gradients.buffers.layout, dense, gradients.buffers):
        if not all_finite(_flat(span)):
            break
    else:
        dense = []
    for index in dense:
        if not all_finite(_flat(gradients.buffers.segment(index))):
            return index
    for index, (_, values) in gradients.sparse.items():
        if not all_finite(_flat(values)):
            return index
    return None


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


@final
class Watch:
    """Look at numbers as they arrive, so that little is left to do when the last ones have.

    Args:
        spans: flat tensors, in the order in which their bytes come.
        look: says whether a piece is finite.

    Attributes:
        finite: whether all that were looked at are.
        seconds: how long that took.
    """

    def __init__(self, spans: Sequence[Tensor], look: Callable[[Tensor], bool] = all_finite) -> None:
        self._look = look
        self.finite = True
        self.seconds = 0.0
        self._left = list(reversed(spans))
        self._before = 0  # bytes of the spans that are over
        self._at = 0  # elements of the present one that were looked at

    @property
    def over(self) -> bool:
        """Return whether everything was looked at, and found to be finite."""
        return self.finite and not self._left

    def arrived(self, received: int) -> None:
        """Look at what is new.

        Args:
            received: bytes that are there, from the first one on.
        """
        began = time.perf_counter()
        while self._left and self.finite:
            span = self._left[-1]
            there = min(received - self._before, span.nbytes) // span.itemsize
            complete = there == span.numel()
            while self.finite and (there - self._at >= PIECE or (complete and self._at < there)):
                stop = min(self._at + PIECE, there)
                self.finite = self._look(span[self._at : stop])
                self._at = stop
            if not complete or not self.finite:
                break
            self._before += span.nbytes
            self._at = 0
            self._left.pop()
        self.seconds += time.perf_counter() - began
