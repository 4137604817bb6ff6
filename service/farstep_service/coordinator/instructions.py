"""What a coordinator tells the others to do: the tensors to change, the actor to answer.

    TakeStep  LeaveOut  Write  Grow             to the tensors: each has a result, with which the coordinator goes on
    KeepBase  DropBases  SetOptions  SetMode    to the tensors, at once
    Answer                                      to the actor: a write is decided about, and its tensors can go

All are plain values that can be written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from farstep.errors import FarstepError
from farstep.protocol.consistency import Consistency
from farstep.protocol.messages import WriteName
from farstep.protocol.receipt import Receipt


@dataclass(frozen=True, slots=True)
class TakeStep:
    """Reduce the gradients of pushes and take the step that they make.

    Attributes:
        pushes: in the order of their sum.
        unnamed: how many of them, the last ones, are of workers whose names order nothing: their contents do.
        divisor: what the sum is divided by.
        weights: what each gradient counts, or a lone step's learning rate is multiplied by.
        compensation: the strength with which stale gradients are corrected, 0 for not at all.
    """

    pushes: tuple[WriteName, ...]
    unnamed: int
    divisor: int
    weights: tuple[float, ...]
    compensation: float = 0.0


@dataclass(frozen=True, slots=True)
class LeaveOut:
    """Put options into force that came with pushes that are not applied."""

    pushes: tuple[WriteName, ...]


@dataclass(frozen=True, slots=True)
class Write:
    """Replace contents by those that arrived under a name."""

    name: WriteName


@dataclass(frozen=True, slots=True)
class Grow:
    """Grow by the param group that arrived under a name."""

    name: WriteName


@dataclass(frozen=True, slots=True)
class KeepBase:
    """Keep the present version as what a worker has, in the place of the one that was kept for it before."""

    worker: str


@dataclass(frozen=True, slots=True)
class DropBases:
    """Let the versions go that are kept for workers."""

    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetOptions:
    """Put options into force, from the next step on."""

    changes: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class SetMode:
    """Note that the session is in another consistency mode."""

    mode: Consistency


@dataclass(frozen=True, slots=True)
class Answer:
    """Tell the worker of a write what became of it.

    Attributes:
        result: a receipt; or an error, and the write is not committed.
    """

    name: WriteName
    result: Receipt | FarstepError


Awaited = TakeStep | LeaveOut | Write | Grow
"""Instructions that have a result."""
AtOnce = KeepBase | DropBases | SetOptions | SetMode
Instruction = Awaited | AtOnce | Answer
