"""The fused kernel: a rule's compiled program over whole stretches of memory, one pass over each.

Gradients in 16 bits have programs of their own, which widen them in registers. Until those are built, or if they are
not wanted, a block at a time is widened and run by the rule's usual program while it is in the cache, with the same
bits.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from farstep.protocol.memory import TORCH_DTYPES
from farstep_service.kernels.kernel import Call, Kernel, Position, Progress, cut
from farstep_service.kernels.native import LONG_FROM, Program
from farstep_service.kernels.program import LEAST
from farstep_service.kernels.reference import ReferenceKernel
from farstep_service.optimizers.rule import AnyRule, Fields, KernelSignature

MANY_THREADS_FROM = 2**20
"""The elements from which waking other threads pays."""
BATCH = 2**21
"""The elements of calls in one batch: a millisecond's work."""
WIDEN = 2**18
"""The elements that are widened together; a multiple of any vector's length, so that cuts change no bit."""
NUMBERS_KEPT = 256
HALF_PRECISION = frozenset({torch.float16, torch.bfloat16})


class _Key(NamedTuple):
    """The key by which a program is chosen."""

    dtype: torch.dtype
    fields: Fields
    gradient: torch.dtype
    copy: torch.dtype | None = None

    @classmethod
    def of(cls, call: Call) -> _Key:
        return cls(call.p.dtype, tuple(call.state), call.g.dtype, None if call.copy is None else call.copy.dtype)


class _Piece(NamedTuple):
    """A program with its inputs, the number of their elements, and the position after it."""

    then: Position
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
        self._one: dict[_Key, Program] = {}
        self._many: dict[_Key, Program] = {}
        self._rule = rule
        self._device = device
        self._reference = ReferenceKernel(rule)
        self._numbers: dict[tuple[float, ...], Tensor] = {}

    def add(self, form: KernelSignature, program: Program, *, many_threads: bool = False) -> None:
        """Add a program; one for many threads is used for long stretches only."""
        (self._many if many_threads else self._one)[self._key(form)] = program

    def ready(self, forms: Iterable[KernelSignature]) -> bool:
        """Return whether each of these forms has a program."""
        return all(map(self.takes, forms))

    def takes(self, form: KernelSignature) -> bool:
        """Return whether this form has a program."""
        return self._key(form) in self._one

    def _key(self, form: KernelSignature) -> _Key:
        copy = TORCH_DTYPES[form.copy] if form.copy else None
        gradient = TORCH_DTYPES[form.gradient or form.dtype]
        return _Key(TORCH_DTYPES[form.dtype], self._rule.fields(form.optional), gradient, copy)

    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        """Execute calls from `progress` on, a batch of pieces at a time."""
        progress.resume()
        while progress.at.call < len(calls):
            at, call = progress.at, calls[progress.at.call]
            # One that has begun continues in blocks, though its program may be ready now.
            if (
                _is_half_precision(call)
                and call.p.numel() - at.element >= LEAST
                and (at.element or not self._has(call))
            ):
                _run([self._widened(at, call)], progress)
            elif at.element or call.p.numel() < LEAST:
                self._reference.execute(calls[: at.call + 1], progress)
            else:
                for batch in _batches(self._pieces(calls, at.call)):
                    _run(batch, progress)

    def _has(self, call: Call) -> bool:
        return _Key.of(call) in self._one

    def _pieces(self, calls: Sequence[Call], start: int) -> list[_Piece]:
        """Return the pieces up to the next call that is too short for a program, or has none."""
        pieces = []
        for index in range(start, len(calls)):
            call = calls[index]
            if call.p.numel() < LEAST or (_is_half_precision(call) and not self._has(call)):
                break
            pieces.append(self._piece(call, Position(index + 1)))
        return pieces

    def _widened(self, at: Position, call: Call) -> _Piece:
        """Return the next block of a call, with widened gradients."""
        length = call.p.numel()
        stop = at.element + WIDEN
        if length - stop < LEAST:
            stop = length
        part = cut(call, at.element, stop)
        then = Position(at.call + 1) if stop == length else Position(at.call, stop)
        return self._piece(part._replace(g=part.g.to(part.p.dtype)), then)

    def _piece(self, call: Call, then: Position) -> _Piece:
        _check(call)
        p, g, state, out, scalars, copy, _ = call
        key, length = _Key.of(call), p.numel()
        programs = self._many if length >= MANY_THREADS_FROM else self._one
        program = programs.get(key) or self._one[key]
        outs = [out] if copy is None else [out, copy]
        return _Piece(then, program, [p, g, *state.values(), self._tensor(scalars), *outs], length)

    def _tensor(self, scalars: tuple[float, ...]) -> Tensor:
        found = self._numbers.get(scalars)
        if found is None:
            if len(self._numbers) >= NUMBERS_KEPT:
                self._numbers.clear()
            found = self._numbers[scalars] = torch.tensor(scalars, dtype=torch.float64, device=self._device)
        return found


def _run(batch: Sequence[_Piece], progress: Progress) -> None:
    """Run a batch of pieces.

    After an interrupt, `progress` shows which ones have run.
    """
    ready = [piece.program(piece.inputs) for piece in batch]
    returned: list[object] = []
    try:
        # An interrupt comes between two lines of Python, never within this one: a program that has run is in the list,
        # and one that has not is not.
        returned.extend(map(operator.call, ready))
    finally:
        if returned:
            progress.at = batch[len(returned) - 1].then


def _batches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Join short pieces up to a millisecond's work: after each batch, Python runs with cold caches."""
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
    """Refuse inputs with which a program, which does not check them, would write beyond the end of memory.

    The lookup of the program checks the dtypes of gradients and copy.
    """
    shape, dtype = call.p.shape, call.p.dtype
    alike = (call.p, call.out, *call.state.values(), *([] if _is_half_precision(call) else [call.g]))
    for tensor in (*alike, call.g, *([] if call.copy is None else [call.copy])):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"A kernel's tensors differ: {shape} {dtype}, {tensor.shape} {tensor.dtype}.")
    for tensor in alike:
        if tensor.dtype is not dtype:
            raise ValueError(f"A kernel's tensors differ: {shape} {dtype}, {tensor.shape} {tensor.dtype}.")


def _is_half_precision(call: Call) -> bool:
    return call.g.dtype in HALF_PRECISION and call.g.dtype is not call.p.dtype
