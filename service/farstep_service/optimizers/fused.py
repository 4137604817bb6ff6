"""The fused kernel: a rule's compiled program over whole stretches of memory, one pass over each.

torch's loader keeps the interpreter's lock while a program runs, so on a CPU long stretches are handed over in pieces
of a millisecond or less, and whoever else waits (the event loop, above all) gets its turn between them. On a GPU a
program returns when it has been launched.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from farstep.wire.memory import TORCH_DTYPES
from farstep_service.optimizers.program import LEAST
from farstep_service.optimizers.reference import ReferenceKernel
from farstep_service.rule import AnyRule, At, Call, Fields, Form, Kernel, Progress

PIECE = 2**21
"""Elements handed over at once on a CPU: 0.7 ms of Adagrad in float32 on one thread."""
MANY_THREADS_FROM = 2**20
"""Elements from which it pays to wake other threads."""
NUMBERS_KEPT = 256

Run = Callable[[list[Tensor]], object]
"""A loaded program: takes its inputs in order and returns when they are changed."""


class _Piece(NamedTuple):
    """One run of a program, how many elements it takes, and how far the calls have come after it."""

    run: Run
    inputs: list[Tensor]
    length: int
    after: At


def load(path: Path, device: torch.device) -> Run:
    """Load a package into this process; the file must have been checked before.

    `torch._inductor.aoti_load_package` does the same, but first asks the compiler what the processor can do: 16 to 35 s
    in a fresh container, and nothing to do with loading.
    """
    index = int(str(device).partition(":")[2] or -1)
    run: Run = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index).run
    return run


@final
class FusedKernel(Kernel):
    """Run a rule's compiled programs.

    Args:
        rule: the rule.
        device: where the memory is.
    """

    name = "fused"

    def __init__(self, rule: AnyRule, device: torch.device) -> None:
        self._one: dict[tuple[torch.dtype, Fields], Run] = {}
        self._many: dict[tuple[torch.dtype, Fields], Run] = {}
        self._rule = rule
        self._device = device
        self._reference = ReferenceKernel(rule)
        self._numbers: dict[tuple[float, ...], Tensor] = {}

    def add(self, form: Form, run: Run, *, many_threads: bool = False) -> None:
        """Take in a program; one for many threads is used for long stretches only."""
        (self._many if many_threads else self._one)[self._key(form)] = run

    def ready(self, forms: Iterable[Form]) -> bool:
        """Say whether there is a program for each of these forms."""
        return all(self._key(form) in self._one for form in forms)

    def _key(self, form: Form) -> tuple[torch.dtype, Fields]:
        return TORCH_DTYPES[form.dtype], self._rule.fields(form.optional)

    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        """Carry calls out from where `progress` stands, a batch of pieces at a time."""
        progress.resume()
        while progress.at.call < len(calls):
            if calls[progress.at.call].p.numel() < LEAST:
                self._reference.execute(calls[: progress.at.call + 1], progress)
                continue
            for batch in _batches(self._pieces(calls, progress.at)):
                done: list[object] = []
                try:
                    # An interrupt comes between two lines of Python, never within this one: a program that has run is
                    # in the list, and one that has not is not.
                    done.extend(map(operator.call, [piece.run for piece in batch], [piece.inputs for piece in batch]))
                finally:
                    if done:
                        progress.at = batch[len(done) - 1].after

    def _pieces(self, calls: Sequence[Call], at: At) -> list[_Piece]:
        """Return what there is to do up to the next call that is too short for a program."""
        pieces = []
        index, start = at.call, at.element
        for call in calls[index:]:
            p, g, state, out, scalars = call
            length, numbers = p.numel(), self._tensor(scalars)
            if length < LEAST:
                break
            _check(call)
            fields, key = state.values(), (p.dtype, tuple(state))
            while start < length:
                stop = start + PIECE if p.is_cpu and length - start >= PIECE + LEAST else length
                programs = self._many if stop - start >= MANY_THREADS_FROM else self._one
                run = programs.get(key) or self._one[key]
                inputs = [p, g, *fields, numbers, out]
                if stop - start < length:
                    inputs = [each if each is numbers else each[start:stop] for each in inputs]
                after = At(index, stop) if stop < length else At(index + 1)
                pieces.append(_Piece(run, inputs, stop - start, after))
                start = stop
            index, start = index + 1, 0
        return pieces

    def _tensor(self, scalars: tuple[float, ...]) -> Tensor:
        found = self._numbers.get(scalars)
        if found is None:
            if len(self._numbers) >= NUMBERS_KEPT:
                self._numbers.clear()
            found = self._numbers[scalars] = torch.tensor(scalars, dtype=torch.float64, device=self._device)
        return found


def _batches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Join pieces until they are worth a millisecond: between batches, Python's own work finds its caches cold."""
    batch: list[_Piece] = []
    elements = 0
    for piece in pieces:
        batch.append(piece)
        elements += piece.length
        if elements >= PIECE:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch


def _check(call: Call) -> None:
    """Refuse what a program, which trusts its inputs, would turn into a write beyond the end of memory."""
    shape, dtype = call.p.shape, call.p.dtype
    for tensor in (call.p, call.g, call.out, *call.state.values()):
        if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
            raise ValueError(f"A kernel's tensors differ: {shape} {dtype}, {tensor.shape} {tensor.dtype}.")
