"""What a session keeps on disk, chosen when it is created: three levels, each with three forms.

    argument    "none"
    document    {"level": "none"}
    text        none

    argument    farstep.Snapshot(every_steps=100)
    document    {"level": "snapshot", "every_steps": 100, "every_s": 60.0}
    text        snapshot:every_steps=100,every_s=60

    argument    farstep.Journal(sync="group")
    document    {"level": "journal", "sync": "group"}
    text        journal:group

The document travels to a server. The text is for people: the command line, listings, banners and answers. In both,
options that are left out have their defaults, so `snapshot` is `Snapshot()` and `journal` is `journal:os`. A session in
memory only has the level "none".
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Final, Literal, get_args

from farstep.errors import invalid_option
from farstep.protocol.plain import pythons_own, take_pythons_own_

Sync = Literal["os", "group", "always"]
SYNCS: Final = get_args(Sync)
NONE: Final = "none"
LONGEST_S: Final = 7 * 86_400
MOST_STEPS: Final = 2**53
"""The largest number that JSON holds exactly everywhere."""
LONGEST_TEXT: Final = 128
"""Characters of a level's text, at most."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Write the whole session down now and then, without stopping its steps.

    A server that dies loses the steps since the last snapshot: the session goes back to it, and its workers' next calls
    raise `StateRolledBack`. A server that is stopped in order loses nothing.

    Attributes:
        every_steps: versions after which another snapshot is due; None to go by the time alone.
        every_s: seconds after which another one is due if there was a step; None to go by the steps alone.

    Raises:
        InvalidOption: a value out of range, or neither.
    """

    every_steps: int | None = None
    every_s: float | None = 60.0

    level: ClassVar[str] = "snapshot"

    def __post_init__(self) -> None:
        take_pythons_own_(self)
        steps, seconds = self.every_steps, self.every_s
        if steps is not None and (type(steps) is not int or not 1 <= steps <= MOST_STEPS):
            raise invalid_option(f"Invalid every_steps: {steps!r:.80}. Must be an int from 1 to 2**53.", "every_steps")
        if seconds is not None and (type(seconds) not in (int, float) or not 0 < seconds <= LONGEST_S):
            raise invalid_option(f"Invalid every_s: {seconds!r:.80}. Must be seconds from 0 to a week.", "every_s")
        if steps is None and seconds is None:
            raise invalid_option(
                "A snapshot is never due: every_steps and every_s are both None.",
                remedy="Give at least one of them.",
                field="every_s",
            )
        if seconds is not None:
            object.__setattr__(self, "every_s", float(seconds))


@dataclass(frozen=True, slots=True)
class Journal:
    """Write every change down before it is answered, so that a server that dies loses no acknowledged step.

    Attributes:
        sync: what an acknowledged step survives. "os": the death of the server, as the system has the bytes. "group":
            also power loss, as the disk has them; steps that end at the same time share one sync. "always": the same,
            with a sync for each step.

    Raises:
        InvalidOption: another word.
    """

    sync: Sync = "os"

    level: ClassVar[str] = "journal"

    def __post_init__(self) -> None:
        take_pythons_own_(self)
        if self.sync not in SYNCS:
            raise invalid_option(f"Invalid sync: {self.sync!r:.80}. There are {', '.join(SYNCS)}.", "sync")


Durability = Literal["none"] | Snapshot | Journal
_LEVELS: Final[Mapping[str, type[Snapshot] | type[Journal]]] = {each.level: each for each in (Snapshot, Journal)}
LEVELS: Final = (NONE, *_LEVELS)


def checked(given: object) -> Durability:
    """Return the argument if it is a level.

    Raises:
        InvalidOption: it is anything else, such as a level's name.
    """
    if isinstance(given, (Snapshot, Journal)):
        return given
    if isinstance(given, str) and pythons_own(given) == NONE:
        return NONE
    raise invalid_option(
        f"Invalid durability: {given!r:.80}.",
        remedy='Give "none", farstep.Snapshot(...) or farstep.Journal(...).',
        field="durability",
    )


def to_document(durability: Durability) -> dict[str, str | int | float | None]:
    """Return a level as the document on the wire."""
    if isinstance(durability, str):
        return {"level": durability}
    return {"level": durability.level, **asdict(durability)}


def from_document(document: Mapping[str, object]) -> Durability:
    """Return the level that a document describes.

    Raises:
        InvalidOption: the level or an option is unknown, or a value out of range.
    """
    options = dict(document)
    return _level(options.pop("level", None), options)


def to_text(durability: Durability) -> str:
    """Return a level for people, with all of its options."""
    match durability:
        case Journal(sync=sync):
            return f"journal:{sync}"
        case Snapshot(every_steps=steps, every_s=seconds):
            told = [] if steps is None else [f"every_steps={steps}"]
            told.append(f"every_s={NONE if seconds is None else repr(seconds).removesuffix('.0')}")
            return f"snapshot:{','.join(told)}"
    return durability


def from_text(text: str) -> Durability:
    """Return the level that a text describes.

    Raises:
        InvalidOption: the level or an option is unknown, a value out of range, or an option is given twice.
    """
    level, colon, rest = text.strip().partition(":")
    if not colon:
        return _level(level, {})
    if level == Journal.level:
        return _level(level, {"sync": rest})
    options: dict[str, Any] = {}
    for each in rest.split(","):
        name, equals, value = each.partition("=")
        if not equals or name in options:
            raise invalid_option(
                f"Invalid durability: {text!r:.80}; {each!r:.80} is not OPTION=VALUE, or is given twice.",
                remedy="Such as snapshot:every_steps=100,every_s=60.",
                field="durability",
            )
        options[name] = _value(value)
    return _level(level, options)


def _value(text: str) -> int | float | str | None:
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return None if text == NONE else text


def _level(level: object, options: Mapping[str, Any]) -> Durability:
    kind = _LEVELS.get(level) if isinstance(level, str) else None
    if kind is None and level != NONE:
        raise invalid_option(
            f"Unknown durability {level!r:.80}; there are {', '.join(LEVELS)}.",
            remedy="Such as none, snapshot:every_steps=100,every_s=60, journal:os or journal:group.",
            field="durability",
        )
    known = set() if kind is None else {each.name for each in fields(kind)}
    if unknown := sorted(set(options) - known):
        raise invalid_option(f"Unknown option {unknown[0]!r:.80} of durability {level!r}.", field=unknown[0][:80])
    return NONE if kind is None else kind(**options)
