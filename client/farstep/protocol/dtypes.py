"""The element types of the wire, by their names in headers.

A complex number is two consecutive reals, real part first, so complex memory is real memory of twice the length, given
by `real` and `parts`. Nothing here needs torch; `farstep.protocol.memory` maps to its dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from farstep.errors import Side, TensorMismatch


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type.

    Attributes:
        name: its name on the wire, which is torch's.
        itemsize: bytes per element.
        real: name of the real type of its memory; its own unless complex.
        parts: reals per element, 2 if complex.
    """

    name: str
    itemsize: int
    real: str
    parts: int = 1


DTYPES: Mapping[str, Dtype] = {
    each.name: each
    for each in (
        Dtype("float32", 4, "float32"),
        Dtype("float64", 8, "float64"),
        Dtype("bfloat16", 2, "bfloat16"),
        Dtype("float16", 2, "float16"),
        Dtype("complex64", 8, "float32", 2),
        Dtype("complex128", 16, "float64", 2),
        Dtype("int64", 8, "int64"),
    )
}
"""Every type that occurs in a payload."""

BYTES = Dtype("uint8", 1, "uint8")
"""The type of encoded memory that does not consist of numbers; never a segment's own."""

INDEX = DTYPES["int64"]
"""The type of a sparse gradient's indices; never a segment's own."""

NUMBER = DTYPES["float64"]
"""The type of fields with one number per segment, such as `step`."""

SEGMENT_DTYPES: Mapping[str, Dtype] = {name: each for name, each in DTYPES.items() if each is not INDEX}
"""The types a segment can have."""


def segment_dtype(name: object, *, field: str = "dtype", side: Side = "server") -> Dtype:
    """Return the element type of that name.

    Raises:
        TensorMismatch: no segment can have it.
    """
    found = SEGMENT_DTYPES.get(name) if isinstance(name, str) else None
    if found is None:
        shown = f"{name[:64]!r}" if isinstance(name, str) else f"a {type(name).__name__}"
        raise TensorMismatch(
            f"Parameters cannot have the dtype {shown}.",
            field=field,
            remedy=f"Use one of {', '.join(SEGMENT_DTYPES)}.",
            side=side,
        )
    return found
