"""One version of a session, whole: what it is, what it holds, and which options are in force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farstep.hyper import Hyper
from farstep_service.contents import Contents
from farstep_service.plan import Plan


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Hold everything that one version of a session consists of, in memory of its own.

    Workers are not part of it: whoever joins a session that began with a snapshot begins a life of its own there, so a
    write from before is refused and never applied twice.

    Attributes:
        plan: what the session is, its options at its creation among it.
        groups: the options in force, by param group.
        contents: `param`, the state fields and `present`, of all segments.
        version: the number of this version.
    """

    plan: Plan
    groups: Sequence[Hyper]
    contents: Contents
    version: int
