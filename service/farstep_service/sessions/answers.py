"""Where a session lives, seen from the routes: one interface, whatever is behind it.

The local host keeps the session in this process. A host on another machine has the same verbs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, final

from farstep.consistency import Consistency
from farstep.fields import Shapes
from farstep.growth import AppendHead
from farstep.hyper import Hyper
from farstep.messages import PushHead, PutHead, Times, WriteName
from farstep.receipt import Receipt
from farstep_service.contents import PARAM
from farstep_service.durability import Snapshot
from farstep_service.plan import Plan
from farstep_service.sessions.readers import Outgoing, ReadersPage
from farstep_service.sessions.shared import Offer


@dataclass(frozen=True, slots=True)
class Joined:
    """What a worker is told when it joins."""

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


class Host(ABC):
    """One session, wherever it lives."""

    name: str
    incarnation: str

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """What the session is now; it grows by param groups."""

    @property
    @abstractmethod
    def options(self) -> Sequence[Hyper]:
        """The options of each param group that are in force."""

    @property
    @abstractmethod
    def switched(self) -> bool:
        """Whether its consistency mode is another than its workers joined with."""

    @property
    @abstractmethod
    def parameter_bytes(self) -> int:
        """The bytes of its parameters, those of a group that is being added included."""

    @abstractmethod
    async def join(self, worker: str, groups: int, *, named: bool = True) -> Joined:
        """Open a new epoch of a worker that knows so many param groups.

        Args:
            named: its name was chosen, so that the order of names is the same in every run.

        Raises:
            OptionsDiffer: the session has grown since the worker's plan was compared with its own.
        """

    @abstractmethod
    async def leave(self, worker: str, epoch: int) -> None:
        """Give a worker's place up."""

    @abstractmethod
    async def renew(self, worker: str, epoch: int, incarnation: str) -> Renewed:
        """Renew a worker's lease without a write.

        Raises:
            SessionLost, Fenced: the worker joined another life of the session, or its epoch is over.
        """

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """The bytes of the memory that workers share with the session."""

    @abstractmethod
    async def share(self, worker: str, offer: Offer) -> None:
        """Map memory of a worker, in the place of what it shared before, for as long as its epoch lasts.

        Raises:
            Fenced: the worker has another epoch.
            InvalidOption: it is not memory that can be shared.
        """

    @abstractmethod
    async def deliver(self, head: PushHead, view: View, spent: Intake | None) -> bool:
        """Put parameters where a push wants them; return whether they are there, and need no body.

        Args:
            spent: the push's, whose step has put most of them there already.
        """

    @abstractmethod
    async def worker(self, worker: str) -> WorkerPage:
        """Say where a worker stands."""

    @abstractmethod
    async def summary(self, most: int = 0) -> Summary:
        """Describe the session as it is now, with the first `most` of its groups and workers."""

    @abstractmethod
    async def workers(self, after: str, most: int) -> dict[str, WorkerPage]:
        """Say where the first `most` workers stand whose names come after one."""

    @abstractmethod
    async def groups(self, first: int, most: int) -> list[dict[str, Any]]:
        """Return the options of `most` param groups from one on."""

    @abstractmethod
    async def set_groups(self, changes: Mapping[int, Mapping[str, Any]]) -> None:
        """Change options of param groups."""

    @abstractmethod
    async def set_consistency(self, mode: Consistency) -> None:
        """Go on in another mode, from the next push on and for those that wait.

        Raises:
            SessionFull: there are more live workers than the mode has places for.
            InvalidOption: the optimizer does not go with the mode.
        """

    @abstractmethod
    def begin_push(self, head: PushHead, body_bytes: int) -> Intake:
        """Check a push's header and return memory for its payload."""

    @abstractmethod
    async def push(self, head: PushHead, intake: Intake, fingerprint: str) -> Answer:
        """Take a complete push in and wait for what becomes of it."""

    @abstractmethod
    def begin_put(self, head: PutHead, body_bytes: int) -> Intake:
        """Check the header of new contents and return memory for their payload."""

    @abstractmethod
    async def put(self, head: PutHead, intake: Intake, fingerprint: str) -> Answer:
        """Replace contents."""

    @abstractmethod
    def begin_append(self, head: AppendHead, body_bytes: int) -> Intake:
        """Check the header of a param group and return memory for its parameters."""

    @abstractmethod
    async def append(self, head: AppendHead, intake: Intake, fingerprint: str) -> Answer:
        """Grow by a param group, or note that a worker knows it."""

    @abstractmethod
    async def parameters(
        self,
        since: int | None = None,
        write: WriteName | None = None,
        half: str | None = None,
        spent: Intake | None = None,
        reader: Reader | None = None,
        outgoing: Outgoing | None = None,
    ) -> View:
        """Hold the parameters of the current version: all, or those that changed after version `since`.

        Args:
            write: leave those of groups out that its worker did not know when it made this write.
            half: the name of the codec to give them in; None for as they are.
            spent: a push's, which has been answered for: its memory may be written over.
            reader: who reads them, where that is not the worker of a write; its lease is renewed.
            outgoing: the answer that they go into, where it is known; a slow one is cut while others wait for it.

        Raises:
            Busy: others read for too long.
        """

    @abstractmethod
    def copying(self, nbytes: int, outgoing: Outgoing | None) -> AbstractAsyncContextManager[None]:
        """Wait until so many bytes of the session may be copied, and count them while the copy is being sent.

        Raises:
            Busy: others read for too long.
        """

    @abstractmethod
    async def contents(self, fields: Sequence[str], indices: Sequence[int] | None = None) -> View:
        """Copy fields of the current version, of some segments or of all."""

    @abstractmethod
    async def snapshot(self) -> Snapshot:
        """Copy all of the current version, with the options in force at it."""

    @abstractmethod
    async def interrupt(self) -> None:
        """Answer every push that waits, and every one that would from now on, because the server is about to end."""

    @abstractmethod
    async def close(self) -> None:
        """End the session; whoever waits is told so."""
