"""Payloads: the bytes that came with a write, in memory that may be a journal's.

in a journal     received straight into its pages, which are read only from then on: what a step changes, it copies
elsewhere        in memory of its own, which is copied into the journal when the write happens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
import xxhash
from torch import Tensor

from farstep.errors import TensorMismatch

ALIGN: Final = 64
"""What the beginning of each tensor in a `Room` is a multiple of."""
Place = tuple[int, int, int]
"""A place in a journal: segment, offset and size."""


@dataclass(slots=True)
class Payload:
    """What came with a write.

    Attributes:
        pieces: its bytes, in the order of the wire; none once they are in a journal.
        digest: the xxh3_128 of the pieces, or of what is at `place` in a journal; empty while it is not known.
        place: where they are in a journal: segment, offset and size; None for nowhere.
        packed: they lie there as they came, instead of as `Room` placed them.
        memory: the memory of the place, while the pieces are there.
        plain: the one piece is the beginning of that memory.
    """

    pieces: Sequence[memoryview]
    digest: bytes = b""
    place: Place | None = None
    packed: bool = False
    memory: memoryview | None = None
    plain: bool = False

    @property
    def nbytes(self) -> int:
        """Return the bytes of all pieces."""
        return sum(len(piece) for piece in self.pieces)


def digest_of(pieces: Sequence[memoryview]) -> bytes:
    """Return the xxh3_128 of some bytes, one after the other."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


@final
@dataclass(slots=True)
class Room:
    """Memory for tensors, one behind the other.

    Attributes:
        memory: where they go; None for memory of their own.
        used: how many bytes of it are taken.
    """

    memory: memoryview | None = None
    used: int = field(default=0)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor with undefined contents on the CPU."""
        if self.memory is None:
            return torch.empty(*shape, dtype=dtype, device="cpu")
        count, at = math.prod(shape), self.used
        self.used += padded(count * dtype.itemsize)
        if not count:
            return torch.empty(*shape, dtype=dtype, device="cpu")
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=at).view(*shape)


def fill(views: Sequence[memoryview], memory: memoryview) -> None:
    """Copy a payload that lies packed in a journal.

    Raises:
        TensorMismatch: it has another size.
    """
    if (wanted := sum(map(len, views))) != len(memory):
        raise TensorMismatch(f"A payload has {len(memory)} bytes, and {wanted} are announced.")
    at = 0
    for view in views:
        view[:] = memory[at : at + len(view)]
        at += len(view)


def padded(nbytes: int) -> int:
    """Return a size rounded up, as `Room` takes it."""
    return -(-nbytes // ALIGN) * ALIGN


Reserve = Callable[[int], tuple[Place, memoryview]]
"""Returns the place of so many bytes in a journal, and their memory."""
