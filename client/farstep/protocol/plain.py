"""Conversion of numbers and strings of other types to Python's own, which are sent and compared.

    numpy.float32(0.1)                  0.10000000149011612, its exact value
    numpy.int64(4), MyIntEnum.FOUR      4
    numpy.bool_(True)                   True
    tensor(0.1), array([0.1])           of one element: that element
    Fraction(1, 4), Decimal("0.25")     0.25, the nearest float
    numpy.str_("skip"), MyStrEnum.SKIP  "skip"

Any other value is returned unchanged; the option's own check refuses it. Options enter in a few places: the param
groups of an optimizer, farstep's own options, and the records of modes and policies. Each calls this once, so that all
other code sees only Python's own types. Nothing here imports torch or numpy.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import fields
from decimal import Decimal
from typing import Any, Final

PYTHONS: Final = frozenset({float, int, bool, str, type(None)})
"""Types of values that need no conversion."""


def pythons_own(value: Any) -> Any:
    """Return a number or string of any type as Python's own; everything else unchanged.

    A float16, bfloat16 or float32 number becomes the float of its exact value.
    """
    if type(value) in PYTHONS:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if _has_one_element(value):
        value = value.item()
    try:
        if isinstance(value, bool):
            return value
        if isinstance(value, numbers.Integral):
            return int(value)
        if isinstance(value, (numbers.Real, Decimal)):
            return float(value)
    except (OverflowError, ValueError):  # a fraction beyond the largest float, a signalling NaN
        return value
    return value


def take_pythons_own_(record: Any) -> None:
    """Convert the values of a frozen dataclass, in its `__post_init__`, to Python's own types."""
    for each in fields(record):
        value = getattr(record, each.name)
        if type(value) not in PYTHONS:
            object.__setattr__(record, each.name, pythons_own(value))


def _has_one_element(value: Any) -> bool:
    """Return whether this is a tensor, an array or a scalar of an array library, with one element."""
    shape, item = getattr(value, "shape", None), getattr(value, "item", None)
    return isinstance(shape, tuple) and callable(item) and math.prod(shape) == 1
