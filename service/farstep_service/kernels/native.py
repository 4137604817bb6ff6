"""Compiled programs in this process: loaded once, called many times.

On a CPU a program is a shared library with one C function (`library.py`), called through ctypes in two ways:

    brief    Python waits for it: no other thread can keep the interpreter when it comes back
    long     all other threads of Python go on meanwhile

so that a step of a large model blocks neither the event loop nor the step of another session. On a GPU a program
returns when it has been launched, so torch's loader is sufficient.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from farstep_service.kernels.library import ENTRY

LONG_FROM = 2**17
"""The elements from which a call takes so long (25 us) that other Python threads should run meanwhile."""

Bound = Callable[[], object]
"""A prepared call of a program on some tensors, to be made once. It holds only their addresses.

It consists of C functions only, so no keyboard interrupt comes between its end and the caller.
"""

Program = Callable[[list[Tensor]], Bound]
"""A loaded program: takes its inputs in order and returns the call that changes them."""


def load(path: Path, device: torch.device) -> Program:
    """Load a program into this process, from a checked file.

    `torch._inductor.aoti_load_package` does the same, but first asks the compiler for the processor's abilities, which
    takes 16 to 35 s in a fresh container and is not needed for loading.

    Raises:
        OSError, RuntimeError: the file is not a program.
    """
    if device.type == "cpu":
        return NativeProgram(path)
    index = int(str(device).partition(":")[2] or -1)
    return partial(partial, torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index).run)


@final
class NativeProgram:
    """A program for a CPU.

    Args:
        path: the shared library, which must not change.
    """

    def __init__(self, path: Path) -> None:
        self._brief, self._long = (_entry(library(str(path))) for library in (ctypes.PyDLL, ctypes.CDLL))

    def __call__(self, inputs: list[Tensor]) -> Bound:
        """Return the call on these tensors, which must live until it has been made."""
        length = inputs[0].numel()
        memory = (ctypes.c_void_p * len(inputs))(*[each.data_ptr() for each in inputs])
        return partial(self._brief if length < LONG_FROM else self._long, memory, length)


def _entry(library: ctypes.CDLL) -> Callable[..., object]:
    run = getattr(library, ENTRY)
    run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    run.restype = None
    found: Callable[..., object] = run
    return found
