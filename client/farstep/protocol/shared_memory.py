"""Memory that a worker and a server on the same machine share: gradients first, then parameters.

    gradients      one flat run per dtype, in the order in which the session's parameters first have it
    parameters     the same again
    each run       begins at a multiple of 64 bytes; within it the parameters follow each other without gaps

The worker creates it, as a memfd whose size is sealed, so that the other side cannot shrink it and cause a SIGBUS. It
has no name in any directory; the server opens it as `/proc/<pid>/fd/<fd>`, and verifies the random key in its own name.
"""

from __future__ import annotations

import mmap
import os
import secrets
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self, final

import torch
from torch import Tensor

from farstep.protocol import DTYPES
from farstep.protocol.memory import TORCH_DTYPES

SUPPORTED: Final = sys.platform == "linux"
NAME_PREFIX: Final = "farstep-"
_ALIGNMENT: Final = 64

Sizes = Mapping[str, int]
"""Elements by dtype, in the order in which parameters first have it."""


def nbytes_of(sizes: Sizes) -> int:
    """Return the size of gradients and parameters of these sizes together."""
    return 2 * sum(_room(name, size) for name, size in sizes.items())


@final
@dataclass(frozen=True, slots=True)
class SharedMemory:
    """The two halves of mapped memory, as flat tensors by dtype, which keep the mapping alive.

    Attributes:
        gradients: written by the worker, read by the server.
        parameters: written by the server when it answers a push, and otherwise used by the worker alone.
    """

    gradients: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]

    @classmethod
    def over(cls, memory: mmap.mmap, sizes: Sizes) -> Self:
        """Return the halves of a mapping of `nbytes_of(sizes)` bytes, or more."""
        halves: list[dict[str, Tensor]] = []
        at = 0
        for _ in range(2):
            half: dict[str, Tensor] = {}
            for name, size in sizes.items():
                dtype = TORCH_DTYPES[name]
                half[name] = (
                    torch.frombuffer(memory, dtype=dtype, count=size, offset=at)
                    if size
                    else torch.empty(0, dtype=dtype, device="cpu")
                )
                at += _room(name, size)
            halves.append(half)
        return cls(*halves)


@final
@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class OwnedSharedMemory:
    """Shared memory that this process created; a server finds it by `key` and `fd`, until it is closed or gone."""

    memory: SharedMemory
    key: str
    fd: int
    _closing: weakref.finalize[[int], OwnedSharedMemory] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_closing", weakref.finalize(self, os.close, self.fd))

    def close(self) -> None:
        """Close the descriptor, so that no server finds the memory any more."""
        self._closing()


def make(sizes: Sizes) -> OwnedSharedMemory:
    """Create shared memory; all of it is allocated at once, so that it cannot run out later.

    Raises:
        OSError: the system has no memory left, or no sealed memory.
    """
    if sys.platform != "linux":
        raise OSError("this system has no sealed memory")
    import fcntl

    key = secrets.token_hex(16)
    fd = os.memfd_create(NAME_PREFIX + key, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        nbytes = nbytes_of(sizes)
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        memory = SharedMemory.over(mmap.mmap(fd, nbytes), sizes)
    except BaseException:
        os.close(fd)
        raise
    return OwnedSharedMemory(memory, key, fd)


def _room(name: str, size: int) -> int:
    return -(-size * DTYPES[name].itemsize // _ALIGNMENT) * _ALIGNMENT
