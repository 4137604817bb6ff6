"""The consistency modes by their names on the wire, and how to write and read one.

A mode is one file here, with its options, and its line in `Consistency`; and one file on the service, with its state
machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from farstep.errors import InvalidOption, found_by, invalid_option
from farstep.protocol.consistency.bounded import Bounded
from farstep.protocol.consistency.mode import Async, chosen
from farstep.protocol.consistency.sync import Sync

Consistency = Async | Sync | Bounded
MODES: Mapping[str, type[Consistency]] = {each.mode: each for each in get_args(Consistency)}
"""Every mode, by its name on the wire."""


def checked(given: object) -> Consistency:
    """Return the argument if it is a mode.

    Raises:
        InvalidOption: it is anything else, such as a mode's name.
    """
    if not isinstance(given, Consistency):
        *first, last = (each.shown for each in MODES.values())
        raise invalid_option(
            f"Invalid consistency: {given!r:.80}.",
            remedy=f"Give {', '.join(first)} or {last}.",
            field="consistency",
        )
    return given


def to_options(consistency: Consistency) -> dict[str, str | int | float]:
    """Return the mode as the document on the wire, without options that have their default."""
    return {"mode": consistency.mode, **chosen(consistency)}


def from_options(options: Mapping[str, object]) -> Consistency:
    """Return the mode that a document describes.

    Raises:
        InvalidOption: the mode or an option is unknown, or a value out of range.
    """
    rest = dict(options)
    mode = rest.pop("mode", None)
    kind = MODES.get(str(mode))
    if kind is None:
        raise InvalidOption(f"Unknown consistency mode {mode!r:.80}; there are {', '.join(MODES)}.", field="mode")
    unknown = sorted(set(rest) - set(kind.__dataclass_fields__))
    if unknown:
        raise InvalidOption(f"Unknown option {unknown[0]!r:.80} of consistency mode {mode!r}.", field=unknown[0][:80])
    try:
        with found_by("server"):
            return kind(**rest)  # type: ignore[arg-type]  # the record checks its own values
    except TypeError as exc:
        raise InvalidOption(f"Consistency mode {mode!r} needs all of its options.", field="consistency") from exc
