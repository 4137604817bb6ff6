"""Writing the header map: packed, checked by the reader's rules, with shared lists packed only once.

    Names     a list of strings that many headers carry: packed and checked when the first of them is written
    header    packed with an empty list in the place of each `Names`, whose bytes are then put there

The answers of one step name the same workers. With 1,000 workers, packing and checking the list for each answer took 50
us.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, final

import msgpack

from farstep.errors import InvalidRequest, Side
from farstep.protocol.header import check_tree, parse_header, too_long
from farstep.protocol.limits import DEFAULT_LIMITS, Limits

_BEFORE = b"\x81\xa0"
"""A map of one pair, whose key is empty."""
_EMPTY = 1
"""Size of an empty list."""


@final
class Names(tuple[str, ...]):
    """Strings that many headers carry as one list."""

    @cached_property
    def packed(self) -> bytes:
        """Return the list as msgpack bytes.

        Raises:
            InvalidRequest, LimitExceeded: no reader with the default limits accepts it.
        """
        return pack_header({"": [*self]})[len(_BEFORE) :]


_FLAT = frozenset({Names})


def pack_header(header: Mapping[str, Any], *, limits: Limits = DEFAULT_LIMITS, side: Side = "server") -> bytes:
    """Return the header as msgpack bytes, checked by the reader's rules.

    Args:
        header: plain values, and `Names`, which the reader gets as lists.

    Raises:
        InvalidRequest: a value that msgpack or the protocol does not allow.
        LimitExceeded: larger than a reader accepts.
    """
    plain = dict(header)
    try:
        data, gaps = _packed(plain)
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise InvalidRequest(
            "The header holds a value that is not a map, list, string, number, bool, None or bytes.",
            field="header",
            side=side,
        ) from exc
    size = len(data)
    for _, names in gaps:
        size += len(names.packed) - _EMPTY
    if size > limits.header_bytes:
        raise too_long(limits, side)
    if len(data) <= limits.least:
        check_tree(plain, limits, side, wide=b"\xcf" in data, flat=_FLAT)  # a header this small exceeds no other bound
    else:
        parse_header(data, limits=limits, side=side)
    return _filled(data, gaps) if gaps else data


def _packed(header: dict[str, Any]) -> tuple[bytes, list[tuple[int, Names]]]:
    """Return a header with an empty list for each `Names`, and their positions."""
    gaps: list[tuple[int, Names]] = []

    def leave_gap(value: object) -> list[str]:
        if type(value) is not Names:
            raise TypeError(f"a header has no place for {type(value)}")
        with packer.getbuffer() as so_far:
            gaps.append((len(so_far), value))
        return []

    packer = msgpack.Packer(strict_types=True, default=leave_gap)
    try:
        return packer.pack(header), gaps
    finally:
        packer = None  # it and the function would keep each other alive


def _filled(data: bytes, gaps: list[tuple[int, Names]]) -> bytes:
    """Return the bytes of a header with each gap filled."""
    pieces, done = [], 0
    for at, names in gaps:
        pieces += [data[done:at], names.packed]
        done = at + _EMPTY
    return b"".join([*pieces, data[done:]])
