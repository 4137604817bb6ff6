"""The resources of a server process: CPU threads, memory, the collector, a device, prebuilt kernels."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress

from farstep.errors import InvalidOption, Unavailable
from farstep_service.machine import usable_cpus

_TOP_PAD = -2
"""glibc's M_TOP_PAD."""

GARBAGE = (100_000, 5, 2)
"""The garbage collector's thresholds: of new objects, and of the collections before older generations are collected.

A request leaves nothing to collect, however it ends. The collector only traverses waiting pushes: a thousand are 60,000
objects, and traversing them repeatedly took a quarter of the time of their answers.
"""

_DEVICE = re.compile(r"cpu|cuda(?::(\d{1,3}))?")


def tune_(environment: MutableMapping[str, str], steps: int) -> None:
    """Set the variables that OpenMP and torch read when torch is loaded; keep those that the user has set.

    Each step gets its share of the CPUs, and waiting threads sleep: with two that spin on two busy cores a step takes
    50 times longer. Tensors use huge pages where the kernel grants them: writing 100 MB of fresh memory for the first
    time took 47 ms in small pages, 9 ms in huge ones, and 5 ms is the copy itself.
    """
    wanted = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(max(1, usable_cpus() // steps)),
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    for name, value in wanted.items():
        if not environment.get(name):
            environment[name] = value


def keep_freed_memory(kept_bytes: int = 64 << 20) -> None:
    """Let the allocator keep freed memory instead of returning it to the kernel at once.

    uvicorn makes a `bytes` of 256 KiB for each piece of a body. With glibc's own settings each is fresh memory:
    receiving 100 MB then takes 120 ms instead of 43.
    """
    try:
        ctypes.CDLL(None).mallopt(_TOP_PAD, kept_bytes)
    except (AttributeError, OSError):  # another C library
        return


TURN_S = 0.001
"""Seconds for which a Python thread may block the event loop."""


def take_turns() -> None:
    """Let the event loop get the interpreter within a millisecond, instead of five.

    It needs the interpreter after each system call. While a thread read the document of a session of 100,000
    parameters, a turn of the loop took 19 ms (median) and 56 at most; with this it takes 1.2 ms, and 20 at most.
    Kernels run no Python.
    """
    sys.setswitchinterval(TURN_S)


def open_many_files() -> None:
    """Take as many file descriptors as this process may have: each session on the disk has some open."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # some systems say more than they allow
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def loaded_for_good() -> Iterator[None]:
    """Load a server's modules without the garbage collector, and exclude them from later collections.

    torch and FastAPI have half a million objects. Traversing them took 0.4 s and more, in which no session answered,
    and with a thousand workers happened every few thousand pushes.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
        gc.set_threshold(*GARBAGE)
    finally:
        gc.enable()


def check_device_name(name: str) -> None:
    """Refuse an invalid device name, before torch is loaded.

    Raises:
        InvalidOption: it is neither `cpu` nor `cuda` nor `cuda:<number>`.
    """
    if not _DEVICE.fullmatch(name):
        raise InvalidOption(
            f"Invalid device: {name!r:.80}.",
            remedy="There are cpu, cuda, and cuda:1 for the second one.",
            field="device",
        )


def check_device(name: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        InvalidOption: torch finds no such CUDA device.
    """
    import torch

    match = _DEVICE.fullmatch(name)
    if name == "cpu" or match is None:
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= int(match[1] or 0):
        raise InvalidOption(
            f"There is no device {name} here: torch finds {count} CUDA devices.",
            remedy="Pass --device cpu, or see that the driver runs and that torch is a build with CUDA.",
            field="device",
            limit=count,
        )


def kernels_at_hand(device: str) -> str:
    """Return which kernels the first steps on a device will run, in words; nothing is built or loaded."""
    from farstep_service.kernels import usual
    from farstep_service.kernels.compiled_kernels import CompiledKernel, default_directory, find
    from farstep_service.optimizers import RULES

    directory = default_directory()
    try:
        complete = all(
            find(directory, CompiledKernel(rule.name, form.dtype, device, optional=form.optional), rule)
            for rule, form in usual(RULES.values(), ["float32"])
        )
    except Unavailable as exc:
        return f"reference kernels: {exc.detail.rstrip('.')}"
    if complete:
        return "fused kernels"
    return "reference kernels until fused ones are built"
