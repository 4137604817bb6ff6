"""The optimizer state of parameters as a link moves it: one record per parameter, under torch's names.

None stands for a parameter without state. Which fields there are, and of which kinds (`farstep.fields`), the session
says when it is joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from farstep.fields import EVERYWHERE, FieldKind, Shapes

State = dict[str, Tensor | float]
"""The state of one parameter: tensors of the shapes that `farstep.fields` says, and numbers as floats."""


def worth_sending(fields: Mapping[str, FieldKind], states: Iterable[State | None]) -> list[str]:
    """Return the fields but for those that no parameter has, where a parameter may go without."""
    had = {name for own in states if own for name in own}
    return [name for name, kind in fields.items() if kind in EVERYWHERE or name in had]


def shapes_of(fields: Mapping[str, FieldKind], states: Mapping[int, State | None]) -> Shapes:
    """Return the shapes of free fields; None for those that are numbers.

    Raises:
        ValueError: another parameter than the first has them.
    """
    shapes: dict[str, tuple[int, ...] | None] = {}
    for index, own in states.items():
        for name, value in (own or {}).items():
            if fields[name] != "free":
                continue
            if index:
                raise ValueError(f"loaded state dict has {name!r} for parameter {index}; the first one's holds it")
            shapes[name] = tuple(value.shape) if isinstance(value, Tensor) else None
    return shapes
