"""Compiled programs in this process: loaded once, called many times.

On a CPU a program is a shared library with AOTInductor's C interface (`torch/csrc/inductor/aoti_runtime/interface.h`),
made to stay the same over torch's versions. It has two ways in:

    brief    torch's own runner: 1 us a call, and Python waits for it
    long     the C interface through ctypes: 4 us a call, and all other threads of Python go on meanwhile

so that a step of a large model does not stop the event loop, nor the step of another session. On a GPU a program
returns when it has been launched, so torch's loader does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from farstep_service.cpus import usable_cpus

LONG_FROM = 2**17
"""Elements from which a call takes so long (25 us) that the other threads of Python are worth 3 us."""

Bound = Callable[[], object]
"""A call of a program on certain tensors, still to be made, once. What it returns is false unless it failed.

It is made of C functions alone, so no interrupt from the keyboard comes between its end and whoever called it.
"""

Program = Callable[[list[Tensor]], Bound]
"""A loaded program: takes its inputs in order and returns the call that changes them."""


def load(path: Path, device: torch.device) -> Program:
    """Load a program into this process; the file must have been checked before.

    `torch._inductor.aoti_load_package` does the same, but first asks the compiler what the processor can do: 16 to 35 s
    in a fresh container, and nothing to do with loading.

    Raises:
        OSError, RuntimeError: the file is not such a program.
    """
    if device.type == "cpu":
        return NativeProgram(path)
    index = int(str(device).partition(":")[2] or -1)
    return partial(partial, torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index).run)


@final
class NativeProgram:
    """A program for a CPU.

    Args:
        path: the shared library; it must stay as it is.
        at_once: how many threads can be in it at a time; more wait.
    """

    def __init__(self, path: Path, at_once: int | None = None) -> None:
        self._brief = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1).run
        library = ctypes.CDLL(str(path))
        create = library.AOTInductorModelContainerCreateWithDevice
        create.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p]
        self._container = ctypes.c_void_p()
        if create(ctypes.byref(self._container), at_once or usable_cpus(), b"cpu", None):
            raise RuntimeError(f"{path} cannot be started")
        self._run = library.AOTInductorModelContainerRun
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._run.argtypes = [pointer, pointer, size, pointer, size, pointer, pointer]

    def __call__(self, inputs: list[Tensor]) -> Bound:
        """Return the call on these tensors."""
        if inputs[0].numel() < LONG_FROM:
            return partial(self._brief, inputs)
        count = len(inputs)
        handles = (ctypes.c_void_p * count)(*map(_address, torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(inputs)))
        return partial(self._run, self._container, handles, count, None, 0, None, None)


_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _address(handle: object) -> int:
    address: int = _pointer_of(handle, None)
    return address
