"""State fields: their kinds, and the shape of each for one parameter.

    kind        for a parameter (*batch, n, m)      for one of fewer than two dimensions
    number      one number, a 0-dim tensor in torch's state
    count       one whole number, a Python int in torch's state
    precision   the significand bits of the numbers beside it, which in torch's state is their dtype; no entry there
    element     the parameter's own shape
    optional    the parameter's own shape, with some options only
    rows        (*batch, n, 1)                      nothing
    columns     (*batch, 1, m)                      nothing
    vector      nothing                             the parameter's own shape
    free        a number, or a tensor of a shape of its own; the first parameter's only

A parameter without elements has neither rows nor columns: state is never larger than its parameter. Both sides compute
shapes by `shape_of`; only the shapes of free fields are sent.

Some state exists with certain options only (`max_exp_avg_sq` with `amsgrad`, `momentum_buffer` with `momentum`), and
most state only after the first step. On the wire, a field that a parameter lacks is zeros, and the number field
`present` distinguishes them from real zeros: bit i is set for field i of the list in the answer to a join. 0 is a
parameter without any state.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

from farstep.errors import InvalidRequest, Side

FieldKind = Literal["number", "count", "precision", "element", "optional", "rows", "columns", "vector", "free"]

NUMBERS: frozenset[FieldKind] = frozenset({"number", "count", "precision"})
"""Kinds with one number per parameter."""
Shapes = Mapping[str, tuple[int, ...] | None]
"""Shapes of free fields, which are sent with them; None is a number."""
SINGLE = 24
"""The precision of float32, which torch's numbers have until a load casts them to the parameter's dtype."""
PRECISIONS: Mapping[int, str] = {SINGLE: "float32", 53: "float64", 11: "float16", 8: "bfloat16"}
"""The dtypes that torch's numbers may have, by the bits of their significands."""
LARGEST_DIMENSION = 2**48
EVERYWHERE: frozenset[FieldKind] = NUMBERS | {"element"}
"""Kinds that every parameter with state has."""


def shape_of(kind: FieldKind, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape of a parameter's state field, None if the parameter never has that field.

    Args:
        kind: the field's kind.
        shape: the parameter's shape.
    """
    match kind:
        case "number" | "count" | "precision":
            return ()
        case "element" | "optional":
            return tuple(shape)
        case "vector":
            return tuple(shape) if len(shape) < 2 else None
        case "free":
            return None
        case "rows":
            return (*shape[:-1], 1) if len(shape) >= 2 and 0 not in shape else None
        case "columns":
            return (*shape[:-2], 1, shape[-1]) if len(shape) >= 2 and 0 not in shape else None


def check_shape(field: str, kind: FieldKind, found: Sequence[int], parameter: Sequence[int]) -> None:
    """Refuse a state value of another shape than its field's.

    Args:
        field: the field's name.
        kind: the field's kind.
        found: the value's shape.
        parameter: the parameter's shape.

    Raises:
        ValueError: the shape is wrong, or the parameter never has that field.
    """
    expected = shape_of(kind, parameter)
    if expected is None:
        raise ValueError(f"loaded state dict has {field!r} for a parameter of shape {tuple(parameter)}, which has none")
    if tuple(found) != expected:
        whose = "the parameter" if expected == tuple(parameter) else "it should be"
        raise ValueError(f"loaded state dict has {field!r} of shape {tuple(found)}, {whose} {expected}")


def shapes_to_header(shapes: Shapes) -> dict[str, list[int] | None]:
    """Return shapes as header values."""
    return {name: None if shape is None else list(shape) for name, shape in shapes.items()}


def shapes_from_header(values: Mapping[str, Any], side: Side = "server") -> Shapes:
    """Return shapes from header values.

    Raises:
        InvalidRequest: one of them is not a shape.
    """
    shapes: dict[str, tuple[int, ...] | None] = {}
    for name, value in values.items():
        if value is not None and (
            type(value) is not list or not all(type(each) is int and 0 <= each <= LARGEST_DIMENSION for each in value)
        ):
            raise InvalidRequest(
                f"Header key 'shapes' has {value!r:.80} for {name!r:.80}; it must be nil or a list of dimensions.",
                field="shapes",
                side=side,
            )
        shapes[name] = None if value is None else tuple(value)
    return shapes


PRESENT = "present"
"""The name of that number field."""


def mask_of(present: Container[str], fields: Sequence[str]) -> int:
    """Return the mask of the present ones among `fields`."""
    return sum(1 << bit for bit, name in enumerate(fields) if name in present)


def names_of(mask: float, fields: Sequence[str]) -> tuple[str, ...]:
    """Return the fields in a mask, in their order.

    Raises:
        ValueError: the mask has a bit beyond `fields`, or is not a whole number.
    """
    if not 0 <= mask < 1 << len(fields) or mask != int(mask):
        raise ValueError(f"{PRESENT}={mask} stands for no selection of {', '.join(fields)}.")
    return tuple(name for bit, name in enumerate(fields) if int(mask) >> bit & 1)


State = dict[str, "Tensor | float"]
"""The state of one parameter, under torch's names: tensors of the shapes above, and numbers as floats."""


def worth_sending(fields: Mapping[str, FieldKind], states: Iterable[State | None]) -> list[str]:
    """Return the fields, without optional ones that no parameter has."""
    had = {name for own in states if own for name in own}
    return [name for name, kind in fields.items() if kind in EVERYWHERE or name in had]


def shapes_of(fields: Mapping[str, FieldKind], states: Mapping[int, State | None]) -> Shapes:
    """Return the shapes of free fields; None for those that are numbers.

    Raises:
        ValueError: a parameter other than the first has them.
    """
    shapes: dict[str, tuple[int, ...] | None] = {}
    for index, own in states.items():
        for name, value in (own or {}).items():
            if fields[name] != "free":
                continue
            if index:
                raise ValueError(f"loaded state dict has {name!r} for parameter {index}; the first one's holds it")
            shapes[name] = None if isinstance(value, float) else tuple(value.shape)
    return shapes
