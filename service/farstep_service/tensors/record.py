"""The tensors of one session at one moment: with the state of its coordinator, all that a session is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farstep.hyper import Hyper
from farstep.messages import PushHead, WriteName
from farstep_service.durability import Snapshot
from farstep_service.gradients import Contribution
from farstep_service.plan import Plan
from farstep_service.policies import Accumulated
from farstep_service.tensors.staleness import Kept


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
