"""Arguments and results of a session's actor: memory for incoming payloads, views of outgoing ones, and records."""

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
    """The progress of a worker.

    Attributes:
        epoch: the current one, 0 if it has not joined.
        sequence: the number of its last committed write.
        waiting: whether a push of it is waiting.
        lease_s: the rest of its lease; 0 if it is not live.
    """

    epoch: int
    sequence: int
    waiting: bool
    lease_s: float

    @property
    def live(self) -> bool:
        """Whether it sent a message within its lease, or a push of it is waiting."""
        return self.lease_s > 0


@dataclass(frozen=True, slots=True)
class Renewed:
    """The answer to a heartbeat.

    Attributes:
        lapsed: whether the lease had run out.
        lease_s: the length of the new one.
        live: the number of live workers.
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
    """A worker that reads, in one of its epochs."""

    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Summary:
    """A session in a listing.

    Attributes:
        groups, workers: the first of them, as many as requested.
        group_count, worker_count: their numbers.
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
    """The answer to a write."""

    receipt: Receipt
    duplicate: bool
    times: Times


@final
class AtMost(int):
    """The length of a body that comes in chunks and was not announced: at most this many bytes."""


class Intake(ABC):
    """Memory for one incoming body."""

    @property
    @abstractmethod
    def views(self) -> Sequence[memoryview]:
        """The memory for the payload, in order."""

    def arrived(self, received: int) -> None:  # noqa: B027  # most intakes do nothing before the whole payload has arrived
        """Record the number of payload bytes that have arrived."""

    def complete(self, digest: bytes) -> None:  # noqa: B027  # most intakes are not written down as they came
        """Record the xxh3_128 of the whole payload, which has arrived."""


class View(ABC):
    """Contents of one version, which do not change until they are released.

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
        """Release them."""
