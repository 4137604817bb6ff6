"""The fused kernel: a rule's compiled program over whole stretches of memory, one pass over each."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from farstep.wire.memory import TORCH_DTYPES
from farstep_service.kernel import At, Call, Kernel, Progress
from farstep_service.optimizers.native import LONG_FROM, Program
from farstep_service.optimizers.program import LEAST
from farstep_service.optimizers.reference import ReferenceKernel
from farstep_service.rule import AnyRule, Fields, Form

MANY_THREADS_FROM = 2**20
"""Elements from which it pays to wake other threads."""
BATCH = 2**21
"""Elements of calls that are made in one go: a millisecond's work."""
NUMBERS_KEPT = 256


class _Piece(NamedTuple):
    """One call's program with its inputs, and how many elements it takes."""

    number: int
    program: Program
    inputs: list[Tensor]
    length: int


@final
class FusedKernel(Kernel):
    """Run a rule's compiled programs.

    Args:
        rule: the rule.
        device: where the memory is.
    """

    name = "fused"

    def __init__(self, rule: AnyRule, device: torch.device) -> None:
        self._one: dict[tuple[torch.dtype, Fields], Program] = {}
        self._many: dict[tuple[torch.dtype, Fields], Program] = {}
        self._rule = rule
        self._device = device
        self._reference = ReferenceKernel(rule)
        self._numbers: dict[tuple[float, ...], Tensor] = {}

    def add(self, form: Form, program: Program, *, many_threads: bool = False) -> None:
        """Take in a program; one for many threads is used for long stretches only."""
        (self._many if many_threads else self._one)[self._key(form)] = program

    def ready(self, forms: Iterable[Form]) -> bool:
        """Say whether there is a program for each of these forms."""
        return all(self._key(form) in self._one for form in forms)

    def _key(self, form: Form) -> tuple[torch.dtype, Fields]:
        return TORCH_DTYPES[form.dtype], self._rule.fields(form.optional)

    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        """Carry calls out from where `progress` stands, a batch of pieces at a time."""
        progress.resume()
        while progress.at.call < len(calls):
            if progress.at.element or calls[progress.at.call].p.numel() < LEAST:
                self._reference.execute(calls[: progress.at.call + 1], progress)
                continue
            for batch in _batches(self._pieces(calls, progress.at.call)):
                ready = [piece.program(piece.inputs) for piece in batch]
                returned: list[object] = []
                try:
                    # An interrupt comes between two lines of Python, never within this one: a program that has run is
                    # in the list, and one that has not is not.
                    returned.extend(map(operator.call, ready))
                finally:
                    if returned and not returned[-1]:
                        progress.at = At(batch[len(returned) - 1].number + 1)
                if returned[-1]:
                    raise RuntimeError(f"A compiled program ended with the status {returned[-1]}.")

    def _pieces(self, calls: Sequence[Call], start: int) -> list[_Piece]:
        """Return what there is to do up to the next call that is too short for a program."""
        pieces = []
        for index in range(start, len(calls)):
            call = calls[index]
            p, g, state, out, scalars = call
            length = p.numel()
            if length < LEAST:
                break
            _check(call)
            key = (p.dtype, tuple(state))
            programs = self._many if length >= MANY_THREADS_FROM else self._one
            program = programs.get(key) or self._one[key]
            pieces.append(_Piece(index, program, [p, g, *state.values(), self._tensor(scalars), out], length))
        return pieces

    def _tensor(self, scalars: tuple[float, ...]) -> Tensor:
        found = self._numbers.get(scalars)
        if found is None:
            if len(self._numbers) >= NUMBERS_KEPT:
                self._numbers.clear()
            found = self._numbers[scalars] = torch.tensor(scalars, dtype=torch.float64, device=self._device)
        return found


def _batches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Join short pieces until they are worth a millisecond: between batches, Python's own work finds its caches cold.

    A long one is alone: it can return that it failed, and nothing may follow it then.
    """
    batch: list[_Piece] = []
    elements = 0
    for piece in pieces:
        if batch and (piece.length >= LONG_FROM or elements >= BATCH):
            yield batch
            batch, elements = [], 0
        batch.append(piece)
        elements += piece.length if piece.length < LONG_FROM else BATCH
    if batch:
        yield batch


def _check(call: Call) -> None:
    """Refuse what a program, which trusts its inputs, would turn into a write beyond the end of memory."""
    shape, dtype = call.p.shape, call.p.dtype
    for tensor in (call.p, call.g, call.out, *call.state.values()):
        if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
            raise ValueError(f"A kernel's tensors differ: {shape} {dtype}, {tensor.shape} {tensor.dtype}.")
