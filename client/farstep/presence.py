"""Which state fields a parameter has, as one number: bit i is set for field i of the list that a join is answered with.

Some state exists with certain options only (`max_exp_avg_sq` with `amsgrad`, `momentum_buffer` with `momentum`), and
most state not before the first step. On the wire such a field's elements are zeros where a parameter lacks it, and the
number field `present` tells them from zeros that are meant. 0 is a parameter without any state.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

PRESENT = "present"
"""The field name of that number."""


def mask_of(present: Container[str], fields: Sequence[str]) -> int:
    """Return the number that stands for those of `fields` that are present."""
    return sum(1 << bit for bit, name in enumerate(fields) if name in present)


def names_of(mask: float, fields: Sequence[str]) -> tuple[str, ...]:
    """Return the fields that a number stands for, in their order.

    Raises:
        ValueError: it stands for none of `fields`, or is no whole number.
    """
    if not 0 <= mask < 1 << len(fields) or mask != int(mask):
        raise ValueError(f"{PRESENT}={mask} stands for no selection of {', '.join(fields)}.")
    return tuple(name for bit, name in enumerate(fields) if int(mask) >> bit & 1)
