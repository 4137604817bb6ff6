"""The head of a safetensors file, written and read without a tensor.

    8 bytes     n, the length of the JSON, little-endian
    n bytes     {"__metadata__": {text: text}, name: {"dtype": "F32", "shape": [3], "data_offsets": [begin, end]}, ...}
    the rest    the tensors' bytes, one after the other without a gap, little-endian and row-major

A farstep session is exported as such a file (`docs/sessions.md`). This module knows the container only: a head is
checked against the length of the data and for consistency before memory is allocated for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farstep.errors import InvalidFile, Side
from farstep.protocol.dtypes import DTYPES

LENGTH_BYTES = 8
MAX_HEAD_BYTES = 100_000_000
"""The longest JSON, as in the safetensors library."""
MAX_TENSORS = 1_000_000
METADATA = "__metadata__"
CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The format's name of each real dtype. Complex tensors are stored as pairs of reals, in a last dimension of 2."""

_DTYPES = {code: DTYPES[name] for name, code in CODES.items()}
_MAX_DIMENSIONS = 64
_MAX_DIMENSION = 2**60


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its name, real dtype (`float32`) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return its size."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class FileHead:
    """The head of a file: its tensors in the order of their bytes, and its metadata."""

    entries: Sequence[Entry]
    metadata: Mapping[str, str]


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Return tensors in the order of a file: larger element types first, so that each is aligned."""
    return sorted(entries, key=lambda entry: -DTYPES[entry.dtype].itemsize)


def write_head(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Return a file's bytes up to those of the tensors, which follow in the order of `entries`."""
    document: dict[str, Any] = {METADATA: dict(metadata)}
    begin = 0
    for entry in entries:
        end = begin + entry.nbytes
        document[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def head_length(first: bytes, file_bytes: int, *, side: Side = "server") -> int:
    """Return the length of the JSON from the first eight bytes of a file.

    Raises:
        InvalidFile: a file of this size cannot have such a head.
    """
    length = int.from_bytes(first, "little")
    if len(first) < LENGTH_BYTES or length > min(file_bytes - LENGTH_BYTES, MAX_HEAD_BYTES):
        raise invalid_file(f"its first bytes announce a head of {length} bytes, and it has {file_bytes}", side)
    return length


def read_head(text: bytes | bytearray, data_bytes: int | None, *, side: Side = "server") -> FileHead:
    """Read the JSON of a file.

    Args:
        text: the JSON.
        data_bytes: the number of bytes that follow it, None if unknown.
        side: the side that reads.

    Raises:
        InvalidFile: it is not a head, or does not match the data.
    """
    # An empty list takes two bytes here and 56 in memory.
    if not text.startswith(b"{") or text.count(b"[") + text.count(b"{") > 3 * MAX_TENSORS + 2:
        raise invalid_file("its head is no JSON object of a bearable size", side)
    try:
        document = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise invalid_file(f"its head cannot be read: {exc!s:.200}", side) from None
    metadata = document.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise invalid_file("its metadata are not texts by name", side)
    placed = sorted(
        (_entry(name, value, side) for name, value in document.items()), key=lambda each: (each[0], each[1])
    )
    at = 0
    for begin, end, entry in placed:
        if begin != at or end - begin != entry.nbytes:
            raise invalid_file(
                f"tensor {entry.name!r:.200} is said to lie from byte {begin} to {end}; "
                f"it has {entry.nbytes} bytes and begins at {at}",
                side,
            )
        at = end
    if data_bytes is not None and at != data_bytes:
        raise invalid_file(f"its tensors take {at} bytes, and {data_bytes} follow the head", side)
    return FileHead([entry for _, _, entry in placed], metadata)


def _entry(name: str, value: object, side: Side) -> tuple[int, int, Entry]:
    if isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        known = _DTYPES.get(dtype) if isinstance(dtype, str) else None
        if known and _are_sizes(shape, _MAX_DIMENSIONS) and _are_sizes(offsets, 2) and len(offsets) == 2:
            return offsets[0], offsets[1], Entry(name, known.name, tuple(shape))
    raise invalid_file(f"its head describes tensor {name!r:.200} as {value!r:.200}", side)


def _are_sizes(values: object, most: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(each) is int and 0 <= each <= _MAX_DIMENSION for each in values)
    )


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def invalid_file(why: str, side: Side = "server") -> InvalidFile:
    """Return the error for an invalid file."""
    return InvalidFile(
        f"This is not a whole session file: {why}.",
        remedy="Export the session again with `farstep sessions export`, or copy the file again.",
        side=side,
    )
