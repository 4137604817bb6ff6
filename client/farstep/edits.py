"""Which tensors are not what a copy of them says: compared byte by byte.

Version counters would be cheaper to look at, but writing through `.data` does not move them, and `p.data.clamp_(...)`
is what much code does after a step. Comparing costs less than moving the same bytes once: for 300 small tensors about a
tenth of a millisecond, for 100 MB about 13 ms (`tests/benchmarks/bench_bookkeeping.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from farstep.bits import same_bits

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.restype = ctypes.c_int


@final
class Edits:
    """Compare tensors with contiguous copies of them on the CPU.

    Args:
        tensors: whose bytes may change; other memory may be put behind one (`p.data = ...`).
        copies: what they are compared with, in memory that stays.
    """

    def __init__(self, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._copies = list(copies)
        self._there = [ctypes.c_void_p(copy.data_ptr()) for copy in copies]
        self._addresses: list[int] = []

    def found(self) -> list[int]:
        """Return the indices of those that differ."""
        addresses = list(map(Tensor.data_ptr, self._tensors))
        if addresses != self._addresses:
            self._look_again_(addresses)
        if not self._odd and not any(map(_memcmp, self._here, self._there, self._sizes)):
            return []
        odd = set(self._odd)
        return [index for index in range(len(self._tensors)) if self._differs(index, odd)]

    def _differs(self, index: int, odd: set[int]) -> bool:
        if index in odd:
            return not same_bits(self._tensors[index].detach().cpu(), self._copies[index])
        return bool(_memcmp(self._here[index], self._there[index], self._sizes[index]))

    def _look_again_(self, addresses: list[int]) -> None:
        """Find out which tensors' memory can be compared as it is; of the odd ones no byte is."""
        self._addresses = addresses
        self._here = [ctypes.c_void_p(address) for address in addresses]
        self._odd = [i for i, (p, copy) in enumerate(zip(self._tensors, self._copies, strict=True)) if _is_odd(p, copy)]
        sizes = [copy.nbytes for copy in self._copies]
        for index in self._odd:
            sizes[index] = 0
        self._sizes = [ctypes.c_size_t(size) for size in sizes]


def _is_odd(tensor: Tensor, copy: Tensor) -> bool:
    """Say whether a tensor's memory does not simply hold its elements in order, as the copy's does."""
    alike = tensor.shape == copy.shape and tensor.dtype == copy.dtype and tensor.device == copy.device
    plain = tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return not (alike and plain)
