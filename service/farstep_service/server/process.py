"""What the machine has for a server: CPUs, a device, kernels that were built ahead."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from farstep.errors import InvalidOption, Unavailable
from farstep_service.machine import usable_cpus

_TOP_PAD = -2
"""glibc's M_TOP_PAD."""

GARBAGE = (100_000, 5, 2)
"""How many more objects than are freed there may be before the collector looks at the young ones, and how often it
looks at those before it looks at older ones.

A request leaves nothing to collect, however it ends. What the collector finds are pushes that wait: a thousand are
60,000 objects, and looking at them again and again took a quarter of the time that their answers take.
"""

_DEVICE = re.compile(r"cpu|cuda(?::(\d{1,3}))?")


def tune_(environment: MutableMapping[str, str], steps: int) -> None:
    """Set the variables that OpenMP and torch read when torch is loaded; those that the user has set stay.

    Each step gets its share of the CPUs, and threads that wait for each other sleep: with two that spin on two busy
    cores a step takes 50 times longer. Tensors lie in huge pages where the kernel grants them: writing 100 MB of fresh
    memory for the first time took 47 ms in small pages, 9 ms in huge ones, and 5 ms is the copy itself.
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
    """Let the allocator keep that much freed memory at hand instead of returning it to the kernel at once.

    uvicorn makes a `bytes` of 256 KiB for each piece of a body. With glibc's own settings each is fresh memory again:
    receiving 100 MB then takes 120 ms in place of 43.
    """
    try:
        ctypes.CDLL(None).mallopt(_TOP_PAD, kept_bytes)
    except (AttributeError, OSError):  # another C library
        return


TURN_S = 0.001
"""Seconds for which a thread that runs Python may keep the event loop from going on."""


def take_turns() -> None:
    """Let the event loop have its turn a millisecond after it asks for it, in place of five.

    It asks after each call of the system. While a thread read the document of a session of 100,000 parameters, a turn
    of the loop took 19 ms in the middle and 56 at most; so it takes 1.2 ms, and 20 at most. Kernels run no Python.
    """
    sys.setswitchinterval(TURN_S)


@contextmanager
def loaded_for_good() -> Iterator[None]:
    """Load what a server consists of without a collector, which leaves all of it alone afterwards.

    torch and FastAPI come to half a million objects. Looking at them took 0.4 s and more, in which no session
    answered, and with a thousand workers under way every few thousand pushes: their requests are what grows old.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
        gc.set_threshold(*GARBAGE)
    finally:
        gc.enable()


def check_device_name(name: str) -> None:
    """Refuse a device that there cannot be, before torch is loaded.

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
    """Say which kernels the first steps on a device will run; nothing is built or loaded for the answer."""
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
