"""What the actor of a session takes and gives: memory for what arrives, views of what leaves, and records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from farstep.protocol import MAX_HEADER_BYTES, Limits
from farstep.protocol.consistency import Consistency
from farstep.protocol.fields import Shapes
from farstep.protocol.messages import Times
from farstep.protocol.receipt import Receipt
from farstep_service.sessions.readers import ReadersPage
from farstep_service.tensors.contents import PARAM

OVERHEAD_BYTES = MAX_HEADER_BYTES + 5 * Limits().frames
"""Bytes of a message that are not payload, at most."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The answer to a worker that joins."""

    epoch: int
    initialised: bool
    initialise: bool
    version: int


@dataclass(frozen=True, slots=True)
class WorkerPage:
    """Where a worker stands.

    Attributes:
        epoch: the current one, 0 if it has not joined.
        sequence: of its last committed write.
        waiting: whether a push of it waits.
        lease_s: how long its lease still runs; 0 for one that is not live.
    """

    epoch: int
    sequence: int
    waiting: bool
    lease_s: float

    @property
    def live(self) -> bool:
        """Whether it was heard of within its lease, or a push of it waits."""
        return self.lease_s > 0


@dataclass(frozen=True, slots=True)
class Renewed:
    """What a heartbeat is answered with.

    Attributes:
        lapsed: whether the lease had run out.
        lease_s: how long the new one is.
        live: how many workers are live.
        version: the session's.
        consistency: its mode.
    """

    lapsed: bool
    lease_s: float
    live: int
    version: int
    consistency: Consistency


@dataclass(frozen=True, slots=True)
class Reader:
    """Name a worker that reads, in one of its epochs."""

    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Summary:
    """A session as a listing shows it.

    Attributes:
        groups, workers: the first of them, as many as were asked for.
        group_count, worker_count: how many there are.
        bytes: memory by kind.
    """

    version: int
    initialised: bool
    groups: list[dict[str, Any]]
    group_count: int
    workers: dict[str, WorkerPage]
    worker_count: int
    bytes: dict[str, int]
    readers: ReadersPage


@dataclass(frozen=True, slots=True)
class Answer:
    """What a write is answered with."""

    receipt: Receipt
    duplicate: bool
    times: Times


@final
class AtMost(int):
    """The length of a body that comes in chunks and was not announced: at most this many bytes."""


class Intake(ABC):
    """Memory that one body is received into."""

    @property
    @abstractmethod
    def views(self) -> Sequence[memoryview]:
        """Where the payload goes, in order."""

    def arrived(self, received: int) -> None:  # noqa: B027  # most memory has nothing to do before all is there
        """Take note that so many bytes of the payload are there."""


class View(ABC):
    """Contents of one version, which stay as they are until they are released.

    Attributes:
        version: the version they belong to.
        count: how many segments the session has at that version.
        segments: which segments they hold, as ranges; None for all.
        fields: which fields they are, in the order of the wire.
        shapes: the shapes of those fields that have one of their own.
        views: their bytes, in the order of the wire.
    """

    def __init__(
        self,
        *,
        version: int,
        count: int,
        segments: list[int] | None,
        views: Sequence[memoryview],
        fields: Sequence[str] = (PARAM,),
        shapes: Shapes | None = None,
    ) -> None:
        self.version = version
        self.count = count
        self.segments = segments
        self.fields = fields
        self.shapes: Shapes = shapes or {}
        self.views = views

    @abstractmethod
    def release(self) -> None:
        """Give them back."""
