"""One worker of a session, as a record, and how errors name workers and writes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from farstep.errors import IdempotencyMismatch
from farstep.protocol.messages import WriteName
from farstep.protocol.receipt import Receipt

NAMED = 20
"""Workers that a message names at most."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A committed write: what it held and what its worker was told."""

    fingerprint: str
    receipt: Receipt


@dataclass(slots=True)
class Member:
    """One worker of a session, in the epoch with which it joined last.

    Attributes:
        epoch: counts the times it joined; a write of another epoch is fenced.
        named: its name was chosen, and orders sums; a random one would give them other bits in every run.
        sequence: that of its last committed write, 0 if there is none.
        receipts: the last committed writes, by sequence, ascending.
        until: when its lease runs out; None if it has lapsed, or a push of it waits.
        lapsed: since when it is not live; None if it is.
        waits: a push of it waits.
        groups: how many param groups it knows; None for all.
        learned: (sequence, group): with which write it added which group, ascending.
        base: the version of the parameters that is kept for it, to make up for its delays; None for none.
    """

    epoch: int
    named: bool = True
    sequence: int = 0
    receipts: OrderedDict[int, Entry] = field(default_factory=OrderedDict)
    until: float | None = None
    lapsed: float | None = None
    waits: bool = False
    groups: int | None = None
    learned: list[tuple[int, int]] = field(default_factory=list)
    base: int | None = None

    @property
    def live(self) -> bool:
        """Return whether others wait for it."""
        return self.lapsed is None


@dataclass(slots=True)
class RosterState:
    """All that a roster is; the rest of it is an index.

    Attributes:
        members: by name, in the order in which leases run out, then those without a lease in that of their names.
        lapsed: the names of those that lapsed, first to lapse first.
        forgotten: the highest epoch of a worker that is not a member any more.
        added_by: by param group, who added it.
    """

    members: dict[str, Member] = field(default_factory=dict)
    lapsed: list[str] = field(default_factory=list)
    forgotten: int = 0
    added_by: dict[int, str] = field(default_factory=dict)


def mismatch(name: WriteName) -> IdempotencyMismatch:
    """Return the error for another content under a name that is taken."""
    return IdempotencyMismatch(
        f"Sequence {name.sequence} of worker {name.worker!r} was sent before with another content.",
        remedy="A retry must repeat the same bytes; a new step needs the next sequence.",
        field="seq",
    )


def some_of(names: Iterable[str]) -> str:
    """Return names for a message: the first ones, and whether there are more."""
    first = list(islice(names, NAMED + 1))
    return ", ".join(first) if len(first) <= NAMED else f"{', '.join(first[:NAMED])} and others"
