"""Edits of tensors: found by comparing them byte by byte with copies, or by object and version counter (`Seen`).

Version counters are cheaper to check, but writing through `.data` does not change them, and much code calls
`p.data.clamp_(...)` after a step. Comparing costs less than moving the same bytes once
(`tests/benchmarks/bench_bookkeeping.py`).

    large tensor        compared in its own memory, a part at a time
    small neighbours    joined and compared at once: a call for each would take longer than the bytes
    odd                 strided, lazily negated, or not on the CPU: compared by torch

`Edits.found` compares at once. `BackgroundCompare` compares in a thread while the gradients of a large step are sent:
sending takes one CPU and comparing another, and a server on the same machine does not fill one by receiving. The last
byte of the request is sent when everything has been compared. A difference aborts the request before, which changes
nothing on the server; then the edit is sent, and the request again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor


class Seen(NamedTuple):
    """A record of a value: the object, the version counter of a tensor, and the elements of a list."""

    value: Any
    version: int
    parts: tuple[Seen, ...] = ()

    @classmethod
    def of(cls, value: Any) -> Seen:
        parts = tuple(map(cls.of, value)) if isinstance(value, list) else ()
        return cls(value, value._version if isinstance(value, Tensor) else 0, parts)

    def is_still(self, value: Any) -> bool:
        if value is not self.value or (isinstance(value, Tensor) and value._version != self.version):
            return False
        return not isinstance(value, list) or (
            len(value) == len(self.parts)
            and all(part.is_still(own) for part, own in zip(self.parts, value, strict=True))
        )


def same_bits(here: Tensor | float, there: Tensor | float) -> bool:
    """Return whether two numbers are equal, or two tensors in every bit, their shape, dtype and device."""
    if not isinstance(here, Tensor) or not isinstance(there, Tensor):
        return not isinstance(here, Tensor) and not isinstance(there, Tensor) and here == there
    if here is there:
        return True
    if here.shape != there.shape or here.dtype != there.dtype or here.device != there.device:
        return False
    return torch.equal(_bits(here), _bits(there))


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    return (torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor).view(torch.uint8)


SMALL_BYTES = 16_384
"""Up to this size, copying a tensor's bytes takes less time than a foreign function call."""

PART_BYTES = 1 << 20
"""The size of one part of a comparison."""

Check = Callable[[], object]
"""Make one comparison, and return a true value if something differs."""

memcmp = ctypes.CDLL(None).memcmp
memcmp.restype = ctypes.c_int


@dataclass(frozen=True, slots=True)
class _Run:
    """Small tensors whose copies are adjacent in memory."""

    members: Sequence[int]
    here: Sequence[memoryview]
    there: ctypes.c_void_p
    nbytes: ctypes.c_size_t


class Comparer(Protocol):
    """An object that compares tensors with copies of them."""

    def found(self, addresses: list[int]) -> list[int]:
        """Return the indices of those that differ; `addresses` is where their memory begins now."""

    def checks(self, addresses: list[int]) -> list[Check]:
        """Return the same comparisons a part at a time; they hold as long as the tensors are not given other memory."""


@final
class Edits:
    """Comparison of tensors with contiguous copies on the CPU.

    Args:
        tensors: the tensors; one may be given other memory (`p.data = ...`).
        copies: the copies, whose memory stays the same.
    """

    def __init__(self, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._copies = list(copies)
        self._there = [ctypes.c_void_p(copy.data_ptr()) for copy in copies]
        self._nbytes = [copy.nbytes for copy in copies]
        self._addresses: list[int] = []
        self._looked = False

    def found(self, addresses: list[int]) -> list[int]:
        """Return the indices of those that differ; `addresses` is where their memory begins now."""
        if addresses != self._addresses or not self._looked:
            self._look_again_(addresses)
        found = [index for index in self._odd if self._odd_differs(index)]
        for run in self._runs:
            if _run_differs(run):
                found += [index for index in run.members if self._differs(index)]
        if any(map(memcmp, *self._single)):
            found += [index for index in self._alone if self._differs(index)]
        return sorted(found)

    def checks(self, addresses: list[int]) -> list[Check]:
        """Return the same comparisons a part at a time; they hold as long as the tensors are not given other memory."""
        if addresses != self._addresses or not self._looked:
            self._look_again_(addresses)
        checks: list[Check] = [partial(self._odd_differs, index) for index in self._odd]
        checks += [partial(_run_differs, run) for run in self._runs]
        for index in self._alone:
            for start in range(0, self._nbytes[index], PART_BYTES):
                checks.append(partial(self._part_differs, index, start))
        return checks

    def _odd_differs(self, index: int) -> bool:
        return not same_bits(self._tensors[index].detach().cpu(), self._copies[index])

    def _part_differs(self, index: int, start: int) -> int:
        here, there = self._addresses[index] + start, (self._there[index].value or 0) + start
        nbytes = min(PART_BYTES, self._nbytes[index] - start)
        return int(memcmp(ctypes.c_void_p(here), ctypes.c_void_p(there), ctypes.c_size_t(nbytes)))

    def _differs(self, index: int) -> bool:
        here = ctypes.c_void_p(self._addresses[index])
        return bool(memcmp(here, self._there[index], ctypes.c_size_t(self._nbytes[index])))

    def _look_again_(self, addresses: list[int]) -> None:
        """Choose how to compare each tensor, after the memory of some has changed."""
        self._addresses, self._looked = addresses, True
        pairs = list(zip(self._tensors, self._copies, strict=True))
        self._odd = [index for index, (tensor, copy) in enumerate(pairs) if _is_odd(tensor, copy)]
        gathered = _neighbours(self._copies, set(self._odd))
        self._runs = [self._run(members) for members in gathered if len(members) > 1]
        taken = {*self._odd, *(index for run in self._runs for index in run.members)}
        self._alone = [index for index in range(len(pairs)) if index not in taken]
        self._single = (
            [ctypes.c_void_p(addresses[index]) for index in self._alone],
            [self._there[index] for index in self._alone],
            [ctypes.c_size_t(self._nbytes[index]) for index in self._alone],
        )

    def _run(self, members: Sequence[int]) -> _Run:
        here = [_bytes_at(self._addresses[index], self._nbytes[index]) for index in members]
        nbytes = sum(self._nbytes[index] for index in members)
        return _Run(members, here, self._there[members[0]], ctypes.c_size_t(nbytes))


def _neighbours(copies: Sequence[Tensor], left_out: set[int]) -> list[list[int]]:
    """Return runs of small copies that are adjacent in memory."""
    runs: list[list[int]] = []
    after = 0
    for index, copy in enumerate(copies):
        if index in left_out or not 0 < copy.nbytes <= SMALL_BYTES:
            continue
        if runs and copy.data_ptr() == after:
            runs[-1].append(index)
        else:
            runs.append([index])
        after = copy.data_ptr() + copy.nbytes
    return runs


def _run_differs(run: _Run) -> bool:
    return bool(memcmp(b"".join(run.here), run.there, run.nbytes))


def _bytes_at(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _is_odd(tensor: Tensor, copy: Tensor) -> bool:
    """Return whether a tensor's memory cannot be compared byte by byte with the copy's."""
    alike = tensor.shape == copy.shape and tensor.dtype == copy.dtype and tensor.device == copy.device
    return not (alike and is_plain(tensor))


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor's memory, on the CPU, holds its plain elements in row-major order."""
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.is_contiguous()
    return dense and not tensor.is_conj() and not tensor.is_neg()


@final
class Edited(Exception):
    """Something differs; raised to abort a request that has begun."""


@final
class BackgroundCompare:
    """Comparisons in a thread, while a large step is sent; they may be stopped and resumed.

    Args:
        checks: returns the comparisons; called in the thread. The compared tensors must not change meanwhile.
    """

    def __init__(self, checks: Callable[[], Sequence[Check]]) -> None:
        self._begin = checks
        self._checks: Sequence[Check] | None = None
        self._next = 0
        self._thread: Thread | None = None
        self._stopped = False
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin or resume."""
        self._stopped = False
        self._thread = Thread(target=self._run, name="farstep-edits", daemon=True)
        self._thread.start()

    def glance(self) -> None:
        """Raise if a difference has been found so far.

        Raises:
            Edited: something differs.
        """
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until everything has been compared.

        Raises:
            Edited: something differs.
        """
        self._join()
        self.glance()

    def stop(self) -> None:
        """Stop the thread."""
        self._stopped = True
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        try:
            if self._checks is None:
                self._checks = self._begin()
            while self._next < len(self._checks) and not self._stopped:
                if self._checks[self._next]():
                    raise Edited
                self._next += 1
        except BaseException as exc:
            self._error = exc
