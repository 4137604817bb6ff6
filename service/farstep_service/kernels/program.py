"""A rule as one compiled program: one pass over memory, for any length and any options.

The rule's own `update` is exported with a symbolic length and with its numbers in a float64 tensor, then compiled ahead
of time by torch's Inductor: to C++ on a CPU, from which `library.py` makes a shared library, to Triton on a GPU, in
torch's own archive. Either loads in milliseconds and needs no compiler. A changed learning rate is another number in
that tensor, never another program.

Inputs, in order: p, g, the element fields in use (changed in place), the scalars, out (may be p), and in some forms a
copy of out (may be g, if that is in the same dtype). Gradients in 16 bits are widened in registers, and a copy in 16
bits is rounded there: the bits are those of passes of their own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from farstep.protocol.memory import TORCH_DTYPES
from farstep_service.kernels.library import compile_library
from farstep_service.optimizers.rule import AnyRule, Fields, KernelSignature

LEAST = 2
"""Fewest elements a program takes: torch specialises lengths 0 and 1."""
MOST = 2**40


class Program(torch.nn.Module):
    """One application of a rule, its results written to memory."""

    def __init__(self, rule: AnyRule, fields: Fields) -> None:
        super().__init__()
        self._rule = rule
        self._fields = fields

    def forward(
        self, p: Tensor, g: Tensor, state: tuple[Tensor, ...], scalars: Tensor, outs: tuple[Tensor, ...]
    ) -> tuple[()]:
        """Write the new parameters to each of `outs` and the new state over the old."""
        named = dict(zip(self._fields, state, strict=True))
        numbers = [scalars[index] for index in range(scalars.shape[0])]
        new_p, new_state = self._rule.update(p, g.to(p.dtype), named, numbers)
        for out in outs:
            out.copy_(new_p)
        for name, value in new_state.items():
            named[name].copy_(value)
        return ()


HALVES = frozenset({"bfloat16", "float16"})


def _vectors(form: KernelSignature, device: torch.device) -> dict[str, int]:
    """Return the length of vectors to compile for, where torch's own choice is a bad one.

    Beside float32, numbers of 16 bits fill half of a vector. In vectors of 512 bits torch masks their loads and stores,
    which then take two to four times as long as memory does, most of all a store to what has just been read.
    """
    if device.type != "cpu" or not HALVES & {form.dtype, form.gradient, form.copy}:
        return {}
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # takes long, and only who compiles needs it

    return {"cpp.simdlen": 256} if pick_vec_isa().bit_width() > 256 else {}


def compile_rule(rule: AnyRule, form: KernelSignature, device: torch.device, *, one_thread: bool, to: Path) -> None:
    """Compile a rule in one form into the file `to`.

    Args:
        rule, form, device: what is compiled, and for what.
        one_thread: whether it is to use one thread or all that torch has.
        to: the file: a shared library for a CPU, torch's archive for a GPU.

    Raises:
        Exception: whatever torch raises without a compiler, or when the compiler fails.
    """
    hyper = rule.hyper()
    count = len(rule.scalars(rule.first(hyper), hyper))

    def memory(dtype: str = form.dtype) -> Tensor:
        return torch.rand(64, device=device).to(TORCH_DTYPES[dtype])

    fields = rule.fields(form.optional)
    state = tuple(memory() for _ in fields)
    outs = (memory(), memory(form.copy)) if form.copy else (memory(),)
    numbers = torch.ones(count, dtype=torch.float64, device=device)
    inputs = (memory(), memory(form.gradient or form.dtype), state, numbers, outs)
    length = {0: Dim("length", min=LEAST, max=MOST)}
    shapes = (length, length, tuple(length for _ in state), None, tuple(length for _ in outs))
    exported = torch.export.export(Program(rule, fields), inputs, dynamic_shapes=shapes)
    threads = {"cpp.threads": 1} if one_thread else {"cpp.dynamic_threads": True}
    options = {**threads, **_vectors(form, device)}
    if device.type == "cpu":
        compile_library(exported, options, to)
    else:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(to), inductor_configs=options)
