"""The errors of the header, and msgpack's own under our names.

msgpack raises many things about bytes that are not right: `ValueError` and its children, but also `OutOfData` and
`BufferFull`, which are none, and `RecursionError` or `MemoryError` for bytes made to cause them. None of them leaves
the wire.
"""

from __future__ import annotations

import re

import msgpack

from farstep.errors import InvalidRequest, LimitExceeded, Side, Truncated
from farstep.wire.limits import Limits

_PASSED = re.compile(r"(\d+) exceeds max_(str|bin|array|map|ext)_len\((\d+)\)")
_UNITS = {
    "str": "a string of {} bytes",
    "bin": "a binary value of {} bytes",
    "array": "an array of {} elements",
    "map": "a map of {} pairs",
}

FOREIGN = (ValueError, TypeError, OverflowError, RecursionError, MemoryError, msgpack.UnpackException)
"""What msgpack raises about bytes that are not right."""


def translate(exc: BaseException, limits: Limits, side: Side) -> InvalidRequest:
    """Return the error of ours that says what msgpack's, one of `FOREIGN`, said."""
    if isinstance(exc, (msgpack.StackError, RecursionError)):
        return too_deep(limits, side)
    if isinstance(exc, msgpack.BufferFull):
        return too_long(limits, side)
    if isinstance(exc, MemoryError):
        return LimitExceeded("The header does not fit in the memory that is left.", field="header", side=side)
    if isinstance(exc, msgpack.OutOfData) or "incomplete input" in str(exc):
        return Truncated("The header ends early.", field="header", side=side)
    if isinstance(exc, msgpack.ExtraData):
        return InvalidRequest("Bytes follow the header where there should be none.", field="header", side=side)
    if isinstance(exc, UnicodeDecodeError):
        return InvalidRequest("The header holds a string that is not UTF-8.", field="header", side=side)
    if isinstance(exc, msgpack.FormatError):
        return InvalidRequest("The header holds the byte 0xc1, which is not msgpack.", field="header", side=side)
    if found := _PASSED.search(str(exc)):
        size, kind, most = found.groups()
        if kind == "ext":
            return extension(side)
        what = _UNITS[kind].format(size)
        return LimitExceeded(f"The header holds {what}; at most {most}.", field="header", limit=int(most), side=side)
    if "map key" in str(exc):
        return InvalidRequest("The header has a key that is not a string.", field="header", side=side)
    if "timestamp" in str(exc).lower():
        return extension(side)
    return InvalidRequest("The header is not valid msgpack.", field="header", side=side)


def too_long(limits: Limits, side: Side) -> LimitExceeded:
    """Return the error of a header of too many bytes."""
    most = limits.header_bytes
    return LimitExceeded(f"The header is larger than {most} bytes.", field="header", limit=most, side=side)


def too_deep(limits: Limits, side: Side) -> LimitExceeded:
    """Return the error of a header nested too deep."""
    most = limits.depth
    return LimitExceeded(f"The header is nested deeper than {most} levels.", field="header", limit=most, side=side)


def extension(side: Side) -> InvalidRequest:
    """Return the error of a header with an extension type."""
    return InvalidRequest(
        "The header holds a msgpack extension type (a timestamp is one).",
        field="header",
        remedy="Send plain values only.",
        side=side,
    )
