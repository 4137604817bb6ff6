"""Memory for gradients that are sent while others are still being computed.

They are copied here unit by unit, and sent from here: the server gets the contents of this memory, whatever happens to
a gradient meanwhile. So one comparison at the end, byte by byte, shows whether it got the right ones. Version counters
would not: `p.grad.data.clamp_(...)` does not change them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from farstep.protocol.memory import tensor_memory
from farstep.tensors import Encoder, is_plain, memcmp, same_bits

UNIT_BYTES: Final = 512 * 1024
"""Bytes to copy at once: they are sent next, while a core's cache has them."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A half-open range of the elements of one gradient."""

    index: int
    first: int
    last: int


@final
class Stage:
    """Memory for one gradient of each parameter, as it is sent.

    Args:
        parameters: the parameters, on the CPU.
        encoder: encodes the gradients, piece by piece (`Encoder.streams`).
    """

    def __init__(self, parameters: Sequence[Tensor], encoder: Encoder) -> None:
        self._encoder = encoder
        self._dtypes = [p.dtype for p in parameters]
        self._counts = [p.numel() for p in parameters]
        self._memory = [
            torch.empty(encoder.length(index), dtype=dtype, device="cpu") for index, dtype in enumerate(encoder.dtypes)
        ]

    def units(self, order: Sequence[int]) -> list[Unit]:
        """Cut gradients into units, in this order."""
        units = []
        for index in order:
            size, count = self._piece(index), self._counts[index]
            units += [Unit(index, first, min(first + size, count)) for first in range(0, count, size)]
        return units

    def nbytes(self, order: Sequence[int]) -> int:
        """Return the size of encoded gradients."""
        return sum(self._memory[index].nbytes for index in order)

    def payload(self, order: Sequence[int]) -> list[memoryview]:
        """Return the memory of gradients, in this order."""
        return [tensor_memory(self._memory[index]) for index in order]

    def memory(self, unit: Unit) -> memoryview:
        """Return the memory of a unit."""
        return tensor_memory(self._encoded(unit.index, unit.first, unit.last))

    def _piece(self, index: int) -> int:
        """Return the number of elements of a gradient to copy at once."""
        return self._encoder.cut(index, UNIT_BYTES // self._memory[index].element_size())

    def _encoded(self, index: int, first: int, last: int) -> Tensor:
        """Return the memory of some elements of a gradient."""
        length = self._encoder.length
        return self._memory[index][length(index, first) : length(index, last)]

    def takes(self, index: int, gradient: Tensor) -> bool:
        """Return whether a gradient can be staged: dense, and of its parameter's dtype and size."""
        dense = gradient.layout is torch.strided and gradient.dtype is self._dtypes[index]
        return dense and gradient.numel() == self._counts[index]

    def fill_(self, unit: Unit, gradient: Tensor) -> None:
        """Copy a unit of a plain gradient."""
        source = gradient.view(-1)[unit.first : unit.last]
        self._encoder.encode_(unit.index, source, self._encoded(unit.index, unit.first, unit.last), unit.first)

    def holds(self, index: int, count: int, gradient: Tensor) -> bool:
        """Return whether the first elements of a plain gradient equal, in every bit, those staged here.

        Args:
            count: how many elements; a unit ends there.
        """
        staged = self._memory[index]
        if not self._encoder.applies(index):
            nbytes = count * staged.element_size()
            here, there = ctypes.c_void_p(gradient.data_ptr()), ctypes.c_void_p(staged.data_ptr())
            return not memcmp(here, there, ctypes.c_size_t(nbytes))
        flat, size = gradient.view(-1), self._piece(index)
        for first in range(0, count, size):
            last = min(first + size, count)
            staged = self._encoded(index, first, last)
            again = torch.empty_like(staged)
            self._encoder.encode_(index, flat[first:last], again, first)
            if not same_bits(again, staged):
                return False
        return True


def plain(gradient: Tensor) -> Tensor:
    """Return a dense gradient with its elements in row-major order; the same memory if it has that order."""
    gradient = gradient.detach()
    return gradient if is_plain(gradient) else gradient.cpu().resolve_conj().resolve_neg().contiguous()
