"""Events, results, instructions and the state of a coordinator as bytes, and back.

    write_down(value) ──► msgpack ──► read_back(bytes) == value

Only the records that are listed here are known, by name, and nothing is ever executed to read one. Heads, receipts,
errors and modes are written in the forms that they have on the wire.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final, cast, get_args

import msgpack

from farstep.errors import FarstepError, from_problem
from farstep.protocol import consistency
from farstep.protocol.growth import AppendHead
from farstep.protocol.messages import PushHead, PutHead, WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator import events, instructions
from farstep_service.coordinator.checks import CoordinatorState, Running
from farstep_service.coordinator.member import Entry, Member, RosterState
from farstep_service.coordinator.modes import decisions
from farstep_service.coordinator.modes.table import MODES

KIND: Final = "kind"
BITS: Final = 63
"""Of integers that msgpack has."""
RECORDS: Final[dict[str, type[Any]]] = {
    kind.__name__: kind
    for kind in (
        *get_args(events.Event),
        *get_args(events.Result),
        *get_args(instructions.Instruction),
        *(each.record for each in MODES.values()),
        *(decisions.Step, decisions.Skip, decisions.Refuse),
        *(WriteName, Entry, Member, RosterState, Running, CoordinatorState),
    )
}
OF_THE_WIRE: Final[dict[str, tuple[type, Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], object]]]] = {
    "PushHead": (PushHead, PushHead.to_header, PushHead.from_header),
    "PutHead": (PutHead, PutHead.to_header, PutHead.from_header),
    "AppendHead": (AppendHead, AppendHead.to_header, AppendHead.from_header),
    "Receipt": (Receipt, Receipt.to_header, Receipt.from_header),
    "Mode": (
        consistency.Mode,
        consistency.to_options,
        consistency.from_options,
    ),
    "Error": (
        FarstepError,
        FarstepError.to_problem,
        lambda problem: from_problem(problem, int(problem["status"])),
    ),
    "Pushed": (decisions.Pushed, lambda pushed: {"values": [*pushed]}, lambda said: decisions.Pushed(*said["values"])),
}


def write_down(value: object) -> bytes:
    """Return a value as bytes.

    Raises:
        TypeError: it holds something that is no plain value and no record that is known here.
    """
    return cast(bytes, msgpack.packb(_plain(value)))


def read_back(written: bytes) -> Any:
    """Return the value that was written down."""
    return _value(msgpack.unpackb(written, strict_map_key=False))


def _plain(value: Any) -> Any:
    """Return a value as msgpack has it: containers as [sign, ...], records as maps."""
    if type(value) is int and value.bit_length() > BITS:
        return ["i", str(value)]  # an option may be any number
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    for kind, (types, form, _) in OF_THE_WIRE.items():
        if isinstance(value, types):
            return {KIND: kind, **{key: _plain(each) for key, each in form(value).items()}}
    name = type(value).__name__
    if RECORDS.get(name) is type(value):
        return {KIND: name, **{each.name: _plain(getattr(value, each.name)) for each in fields(value)}}
    if isinstance(value, dict):
        sign = "o" if isinstance(value, OrderedDict) else "d"
        return [sign, *(_plain(each) for item in value.items() for each in item)]
    if isinstance(value, (tuple, list)):
        return ["t" if isinstance(value, tuple) else "l", *map(_plain, value)]
    raise TypeError(f"{type(value).__name__} cannot be written down")


def _value(plain: Any) -> Any:
    if isinstance(plain, dict):
        kind, own = plain[KIND], {key: _value(each) for key, each in plain.items() if key != KIND}
        return OF_THE_WIRE[kind][2](own) if kind in OF_THE_WIRE else RECORDS[kind](**own)
    if not isinstance(plain, list):
        return plain
    sign, *values = plain
    values = [_value(each) for each in values]
    match sign:
        case "d" | "o":
            pairs = zip(values[::2], values[1::2], strict=True)
            return OrderedDict(pairs) if sign == "o" else dict(pairs)
        case "t":
            return tuple(values)
        case "i":
            return int(values[0])
        case _:
            return values
