"""A message as bytes: the header map, then the payload in msgpack bin frames.

    message = header frame*
    header  = one msgpack map
    frame   = c6 <u32 big endian: size> <size bytes of payload>

Frames may cut the payload anywhere: one frame may hold many tensors, and one tensor may span many frames. Cutting costs
5 bytes per 16 MiB and no copy, and lifts the 4 GiB limit of one msgpack bin.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from farstep.errors import Side
from farstep.protocol.limits import DEFAULT_LIMITS, Limits
from farstep.protocol.packing import pack_header

PREFIX = struct.Struct(">BI")
BIN8, BIN16, BIN32 = 0xC4, 0xC5, 0xC6
PREFIX_BYTES = {BIN8: 2, BIN16: 3, BIN32: 5}
"""Size of a frame's prefix by its first byte. farstep writes the last kind only, and reads all three."""


def encode(
    header: Mapping[str, Any],
    payload: Sequence[memoryview],
    *,
    limits: Limits = DEFAULT_LIMITS,
    side: Side = "server",
) -> list[bytes | memoryview]:
    """Return the buffers of a message, to be sent in this order; the payload's are views of the given memory.

    Args:
        header: the header map, written in its own order.
        payload: contiguous memory of any item type, concatenated; empty pieces vanish, an empty payload has no frames.
        limits: the reader's limits; its `frame_bytes` is the size of every frame but the last.
        side: the side that writes, for errors.

    Raises:
        InvalidRequest, LimitExceeded: no reader accepts the header.
        ValueError: a piece of the payload is not contiguous.
    """
    packed = pack_header(header, limits=limits, side=side)
    pieces = flat(payload)
    size = sum(map(len, pieces))
    if 0 < size <= limits.frame_bytes:
        return [packed, PREFIX.pack(BIN32, size), *pieces]
    return [packed, *Frames(size, limits=limits).cut(pieces)]


@final
class Frames:
    """Insert frame prefixes between the pieces of a payload, as the pieces come.

    Args:
        payload_bytes: size of the whole payload; more is an error.
        limits: the reader's limits.
    """

    def __init__(self, payload_bytes: int, *, limits: Limits = DEFAULT_LIMITS) -> None:
        self._left = payload_bytes
        self._room = 0
        self._frame_bytes = limits.frame_bytes

    def cut(self, payload: Iterable[memoryview]) -> list[bytes | memoryview]:
        """Return the buffers for the payload's next pieces; those of the payload are views of the given memory.

        Raises:
            ValueError: a piece is not contiguous, or the payload has more bytes than announced.
        """
        buffers: list[bytes | memoryview] = []
        for piece in flat(payload):
            at, size = 0, len(piece)
            if size > self._left:
                raise ValueError(f"The payload has {size - self._left} bytes more than its frames were made for.")
            self._left -= size
            while at < size:
                if not self._room:
                    self._room = min(self._left + size - at, self._frame_bytes)
                    buffers.append(PREFIX.pack(BIN32, self._room))
                count = min(self._room, size - at)
                buffers.append(piece if count == size else piece[at : at + count])
                at += count
                self._room -= count
        return buffers


def encoded_size(header_bytes: int, payload_bytes: int) -> int:
    """Return the size in bytes of an encoded message: its Content-Length.

    Args:
        header_bytes: size of the packed header, the first buffer of `encode`.
        payload_bytes: size of the whole payload.
    """
    frames = -(-payload_bytes // DEFAULT_LIMITS.frame_bytes)
    return header_bytes + frames * PREFIX.size + payload_bytes


def flat(memory: Iterable[memoryview]) -> list[memoryview]:
    """Return the same memory as views of single bytes, without the empty ones.

    Raises:
        ValueError: a view is not contiguous, so that its bytes have no single order in memory.
    """
    views = []
    for view in memory:
        if not view.c_contiguous:
            raise ValueError("A payload's memory must be contiguous.")
        if view.nbytes:
            views.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
    return views
