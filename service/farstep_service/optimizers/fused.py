"""The fused kernel: a rule's compiled program over whole stretches of memory, one pass over each.

torch's loader keeps the interpreter's lock while a program runs, so on a CPU long stretches are handed over in pieces
of a millisecond or less, and whoever else waits (the event loop, above all) gets its turn between them. On a GPU a
program returns when it has been launched.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from farstep_service.optimizers.program import LEAST
from farstep_service.optimizers.reference import ReferenceKernel
from farstep_service.rule import AnyRule, At, Call, Kernel, Progress

PIECE = 2**21
"""Elements handed over at once on a CPU: 0.7 ms of Adagrad in float32 on one thread."""
MANY_THREADS_FROM = 2**20
"""Elements from which it pays to wake other threads."""
NUMBERS_KEPT = 256

Run = Callable[[list[Tensor]], object]
"""A loaded program: takes its inputs in order and returns when they are changed."""


def load(path: Path, device: torch.device) -> Run:
    """Load a package into this process; the file must have been checked before."""
    index = str(device).partition(":")[2]
    run: Run = torch._inductor.aoti_load_package(str(path), device_index=int(index or -1)).loader.run
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
        self._one: dict[torch.dtype, Run] = {}
        self._many: dict[torch.dtype, Run] = {}
        self._device = device
        self._reference = ReferenceKernel(rule)
        self._numbers: dict[tuple[float, ...], Tensor] = {}

    def add(self, dtype: torch.dtype, run: Run, *, many_threads: bool = False) -> None:
        """Take in a program; one for many threads is used for long stretches only."""
        (self._many if many_threads else self._one)[dtype] = run

    def ready(self, dtypes: Iterable[torch.dtype]) -> bool:
        """Say whether there is a program for each of these element types."""
        return all(dtype in self._one for dtype in dtypes)

    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        """Carry calls out from where `progress` stands, a piece at a time."""
        progress.resume()
        while progress.at.call < len(calls):
            index, start = progress.at.call, progress.at.element
            call = calls[index]
            length = call.p.numel()
            if length < LEAST:
                self._reference.execute(calls[: index + 1], progress)
                continue
            stop = start + PIECE if call.p.is_cpu and length - start >= PIECE + LEAST else length
            run, inputs = self._ready(call, start, stop)
            done: list[object] = []
            try:
                # An interrupt comes between two lines of Python, never within this one: a program that has run is in
                # the list, and one that has not is not.
                done.extend(map(operator.call, (run,), (inputs,)))
            finally:
                if done:
                    progress.at = At(index, stop) if stop < length else At(index + 1)

    def _ready(self, call: Call, start: int, stop: int) -> tuple[Run, list[Tensor]]:
        p, g, state, out, scalars = call
        _check(call)
        if stop - start < p.numel():
            p, g, out = p[start:stop], g[start:stop], out[start:stop]
            state = tuple(field[start:stop] for field in state)
        programs = self._many if stop - start >= MANY_THREADS_FROM else self._one
        run = programs.get(p.dtype) or self._one[p.dtype]
        return run, [p, g, *state, self._tensor(scalars), out]

    def _tensor(self, scalars: tuple[float, ...]) -> Tensor:
        found = self._numbers.get(scalars)
        if found is None:
            if len(self._numbers) >= NUMBERS_KEPT:
                self._numbers.clear()
            found = self._numbers[scalars] = torch.tensor(scalars, dtype=torch.float64, device=self._device)
        return found


def _check(call: Call) -> None:
    """Refuse what a program, which trusts its inputs, would turn into a write beyond the end of memory."""
    shape, dtype = call.p.shape, call.p.dtype
    for tensor in (call.p, call.g, call.out, *call.state):
        if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
            raise ValueError(f"A kernel's tensors differ: {shape} {dtype}, {tensor.shape} {tensor.dtype}.")
