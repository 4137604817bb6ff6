"""Gradients on their way out: small neighbours are joined in memory of ours, large ones are sent from where they lie.

A view of a tensor's memory takes as long as a copy of some ten thousand of its bytes, and every buffer of a message
costs again on its way to the socket. So a step of many small gradients is one copy, and one buffer.

    up to LARGE_BYTES in all    the payload is there before it is sent
    above                       it is made piece by piece while it is sent; what has to be cast takes the memory of
                                one piece
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import torch
from torch import Tensor

from farstep.payload import Payload
from farstep.tensors.looking import Looking
from farstep.tensors.narrowing import Narrowing
from farstep.tensors.staging import outgoing
from farstep.transport import Batch, Supply
from farstep.wire.memory import tensor_memory

SMALL_BYTES: Final = 32 * 1024
"""Up to here a gradient is copied."""
PIECE_BYTES: Final = 4 << 20
"""What is sent at once of a gradient that lies in memory; with pieces of 256 KiB sending takes a third longer."""
CAST_BYTES: Final = 1 << 20
"""What is cast at once, and sent while a cache still has it."""
JOINED_BYTES: Final = 1 << 20
"""What is joined at once, at most."""
LARGE_BYTES: Final = 4 << 20
"""From here on a payload is made while it is sent."""


@dataclass(frozen=True, slots=True)
class _Joined:
    """Neighbours that are copied, and cast where that is asked for, into one buffer."""

    first: int
    staged: list[Tensor]
    memory: memoryview
    narrowing: Narrowing | None

    @property
    def nbytes(self) -> int:
        return len(self.memory)

    def made(self, gradients: list[Tensor]) -> Iterator[memoryview]:
        chosen = gradients[self.first : self.first + len(self.staged)]
        torch._foreach_copy_(self.staged, chosen)
        if self.narrowing is not None:
            for index, (narrow, wide) in enumerate(zip(self.staged, chosen, strict=True), self.first):
                self.narrowing.check(index, narrow, wide)
        yield self.memory


@dataclass(frozen=True, slots=True)
class _Lying:
    """One that is sent from where it lies."""

    index: int
    nbytes: int

    def made(self, gradients: list[Tensor]) -> Iterator[memoryview]:
        memory = outgoing(gradients[self.index])
        for start in range(0, self.nbytes, PIECE_BYTES):
            yield memory[start : start + PIECE_BYTES]


@dataclass(frozen=True, slots=True)
class _Cast:
    """One that is cast, piece by piece, into memory that the next piece takes."""

    index: int
    elements: int
    scratch: Tensor
    narrowing: Narrowing

    @property
    def nbytes(self) -> int:
        return self.elements * self.scratch.element_size()

    def made(self, gradients: list[Tensor]) -> Iterator[memoryview]:
        gradient = gradients[self.index].detach().reshape(-1)
        for start in range(0, self.elements, len(self.scratch)):
            wide = gradient[start : start + len(self.scratch)]
            narrow = self.scratch[: len(wide)]
            narrow.copy_(wide)
            self.narrowing.check(self.index, narrow, wide)
            yield tensor_memory(narrow)


@final
class Departures:
    """Send the gradients of one optimizer.

    Args:
        parameters: whose gradients they are, in the session's order.
        narrowing: casts those that travel in 16 bits; None where none do.

    Attributes:
        nbytes: size of the payload of all of them.
    """

    def __init__(self, parameters: Sequence[Tensor], narrowing: Narrowing | None = None) -> None:
        self._dtypes = [p.dtype for p in parameters]
        self._narrowing = narrowing
        self._travel = self._dtypes if narrowing is None else narrowing.dtypes
        self._scratch: Tensor | None = None
        self.nbytes = sum(p.numel() * dtype.itemsize for p, dtype in zip(parameters, self._travel, strict=True))
        self._runs: list[_Joined | _Lying | _Cast] = []
        first = size = 0
        for last, p in enumerate(parameters):
            size += p.nbytes
            if last and (size > JOINED_BYTES or not _joined(parameters[last - 1], p)):
                self._runs.append(self._run(parameters, first, last))
                first, size = last, p.nbytes
        if parameters:
            self._runs.append(self._run(parameters, first, len(parameters)))

    @property
    def large(self) -> bool:
        """Say whether the payload is made while it is sent."""
        return self.nbytes >= LARGE_BYTES

    def payload(
        self, gradients: Sequence[Tensor | None], looking: Looking | None = None, *, at_once: bool = False
    ) -> Payload | None:
        """Return the payload of gradients that are all there and dense, None for others.

        It is overwritten by the next one.

        Args:
            gradients: they stay as they are until the payload was sent.
            looking: edits that are looked for while a large payload is sent: all of them before it is whole.
            at_once: the payload has to be there, however large; only without 16-bit ones.

        Raises:
            NonFinite: see `Narrowing`; a large payload raises it, and `Edited`, when it is made.
        """
        there = [each for each in gradients if each is not None and each.layout is torch.strided]
        if [each.dtype for each in there] != self._dtypes:
            return None
        if at_once or not self.large:
            return [piece for run in self._runs for piece in run.made(there)]
        return Supply(partial(self._made, there, looking), self.nbytes)

    def _made(self, gradients: list[Tensor], looking: Looking | None) -> Generator[Batch]:
        left = self.nbytes
        if looking is not None:
            looking.start()
        try:
            for run in self._runs:
                for piece in run.made(gradients):
                    left -= len(piece)
                    if looking is not None and left:
                        looking.glance()
                    elif looking is not None:
                        looking.finish()
                    yield [piece]
        finally:
            if looking is not None:
                looking.stop()

    def _run(self, parameters: Sequence[Tensor], first: int, last: int) -> _Joined | _Lying | _Cast:
        members, dtype = parameters[first:last], self._travel[first]
        narrowing = self._narrowing if dtype != self._dtypes[first] else None
        elements = sum(p.numel() for p in members)
        if last - first == 1 and narrowing is None:
            return _Lying(first, members[0].nbytes)
        if narrowing is not None and self.large and last - first == 1:
            if self._scratch is None:
                self._scratch = torch.empty(CAST_BYTES // dtype.itemsize, dtype=dtype, device="cpu")
            return _Cast(first, elements, self._scratch, narrowing)
        flat = torch.empty(elements, dtype=dtype, device="cpu")
        pieces = torch.split(flat, [p.numel() for p in members])
        staged = [piece.view(p.shape) for piece, p in zip(pieces, members, strict=True)]
        return _Joined(first, staged, tensor_memory(flat), narrowing)


def _joined(before: Tensor, here: Tensor) -> bool:
    return before.dtype == here.dtype and max(before.nbytes, here.nbytes) <= SMALL_BYTES
