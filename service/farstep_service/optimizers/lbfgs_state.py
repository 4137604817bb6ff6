"""The memory of L-BFGS as state fields: numbers and tensors under torch's names, and back.

    func_evals, n_iter, prev_loss     numbers
    t, H_diag                         a number or a 0-dim tensor, as torch has them
    d, prev_flat_grad                 [n], all parameters one after the other
    old_dirs, old_stps                [k, n], torch's lists stacked
    ro                                [k]
    al                                [h]; NaN stands for None, which torch has where there never was a pair

What comes from outside is checked: `check_shapes` before memory is taken for it, `memory_of` when it is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from farstep.errors import LimitExceeded, TensorMismatch
from farstep_service.optimizers.lbfgs import FIELDS
from farstep_service.optimizers.lbfgs_steps import Memory
from farstep_service.optimizers.line_search import Number

Shape = tuple[int, ...] | None
"""A tensor's shape; None for a number."""

COUNTERS = ("func_evals", "n_iter")
TOGETHER = frozenset(FIELDS) - {*COUNTERS, "al"}
"""What a step leaves that has begun an iteration: all or nothing."""
LARGEST_COUNTER = 2**53


def fields_of(memory: Memory) -> dict[str, Number]:
    """Return the fields of an LBFGS memory, which share only their vectors with it."""
    fields: dict[str, Number] = {}
    for name in FIELDS:
        value = getattr(memory, name)
        if value is None:
            continue
        fields[name] = _stacked(memory, name, value) if isinstance(value, tuple) else value
    return fields


def _stacked(memory: Memory, name: str, values: Sequence[Tensor | None]) -> Tensor:
    vector = memory.d
    assert vector is not None
    if name in ("old_dirs", "old_stps"):
        return (
            torch.stack([each for each in values if each is not None]) if values else vector.new_empty(0, len(vector))
        )
    none = vector.new_full((), float("nan"))
    return torch.stack([none if each is None else each for each in values]) if values else vector.new_empty(0)


def check_shapes(shapes: Mapping[str, Shape], length: int, most: int) -> None:
    """Refuse fields whose shapes are not those of a memory.

    Args:
        shapes: of the fields that are announced.
        length: elements of all parameters.
        most: how many pairs it may have.

    Raises:
        TensorMismatch: naming the field.
        LimitExceeded: there are more pairs than a state may bring.
    """
    pairs = (shapes.get("ro") or (0,))[0]
    factors = (shapes.get("al") or (0,))[0]
    expected: dict[str, tuple[Shape, ...]] = {
        "d": ((length,),),
        "prev_flat_grad": ((length,),),
        "old_dirs": ((pairs, length),),
        "old_stps": ((pairs, length),),
        "ro": ((pairs,),),
        "al": ((factors,),),
        "t": (None, ()),
        "H_diag": (None, ()),
    }
    for name, shape in shapes.items():
        if shape not in expected.get(name, (None,)):
            wanted = expected.get(name, (None,))[0]
            raise TensorMismatch(
                f"Field {name!r} has shape {_words(shape)}, a session of {length} elements and {pairs} pairs has "
                f"{_words(wanted)}.",
                field=name,
            )
    if max(pairs, factors) > most:
        raise LimitExceeded(
            f"The state has {max(pairs, factors)} pairs, and may have {most}.",
            field="ro",
            limit=most,
            remedy="Raise history_size.",
        )


def _words(shape: Shape) -> str:
    return "of a number" if shape is None else str(list(shape))


def memory_of(fields: Mapping[str, Number]) -> Memory:
    """Return the memory that fields of the right shapes stand for.

    Raises:
        TensorMismatch: a part is missing, or a counter is none.
    """
    missing = [name for name in COUNTERS if name not in fields]
    has = TOGETHER & fields.keys()
    if not missing and has != TOGETHER and (has or fields["n_iter"] or "al" in fields):
        missing = [name for name in FIELDS if name in TOGETHER - has]
    if missing:
        raise TensorMismatch(f"The state of LBFGS has no {missing[0]!r}.", field=missing[0])
    values: dict[str, object] = dict(fields)
    for name in COUNTERS:
        number = float(fields[name])
        if not (0 <= number <= LARGEST_COUNTER and number.is_integer()):
            raise TensorMismatch(f"{name}={number} is no count.", field=name)
        values[name] = int(number)
    for name in ("d", "prev_flat_grad"):
        if name in fields:
            values[name] = _own(fields[name])
    for name in ("old_dirs", "old_stps", "ro", "al"):
        if isinstance(stacked := fields.get(name), Tensor):
            values[name] = tuple(_own(each) for each in stacked)
    if isinstance(al := values.get("al"), tuple):
        values["al"] = tuple(None if bool(each.isnan()) else each for each in al)
    if isinstance(scale := fields.get("H_diag"), float) and scale.is_integer():
        values["H_diag"] = int(scale)
    return Memory(**values)  # type: ignore[arg-type]  # names and kinds were checked


def _own(value: Number) -> Tensor:
    """Return a tensor in memory of its own: where a vector begins decides how its products are rounded."""
    assert isinstance(value, Tensor)
    return value.clone()
