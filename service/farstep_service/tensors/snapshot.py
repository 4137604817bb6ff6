"""One version of a session: its plan, its contents, and the options in force; and all of its tensors at one moment.

A `TensorsRecord` and the state of the coordinator are all that a session is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farstep.protocol.hyper import Hyper
from farstep.protocol.messages import PushHead, WriteName
from farstep_service.plan import Plan
from farstep_service.tensors.contents import Contents
from farstep_service.tensors.contribution import Contribution
from farstep_service.tensors.policies import Accumulated
from farstep_service.tensors.staleness import Kept


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Hold everything that one version of a session consists of, in memory of its own.

    Workers are not part of it: a session that begins with a snapshot begins a life of its own, so a write from
    before is refused and never applied twice.

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


@dataclass(frozen=True, slots=True)
class TensorsRecord:
    """Hold what `Tensors` holds.

    Attributes:
        plan: what the session is by now.
        groups: the options in force.
        snapshot: the present version; None before the first contents.
        accumulated: the rounds that wait for others.
        bases: the versions that are kept, by worker.
        pushes: the gradients that wait.
        asked: the step that waits for an evaluation of its objective, None for none.
    """

    plan: Plan
    groups: Sequence[Hyper]
    snapshot: Snapshot | None
    accumulated: Accumulated
    bases: Mapping[str, Kept]
    pushes: Mapping[WriteName, tuple[PushHead, Contribution]]
    asked: object = None
