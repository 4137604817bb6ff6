"""The readers of a session, and the memory they hold. Steps never wait for readers; readers wait for each other.

    pull      parameters for any client
    answer    parameters in the answers to pushes: a worker never waits for mere readers
    copy      state, and whole sessions

Each kind has a budget. Readers of the same version share its memory, which counts once. A reader that would exceed the
budget waits until another is done; all waiting readers then get one version, so that any number of slow readers needs
the memory of few. While a reader waits, the version whose readers are slowest is revoked if they all take less than
`FAIR_BYTES_PER_S`: the answers end before the announced length, so that no client takes them for complete.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final, Generic, Literal, Protocol, TypeVar, final

from farstep.errors import Busy
from farstep_service.sessions.coroutines import in_task

ReadKind = Literal["pull", "answer", "copy"]
FAIR_BYTES_PER_S: Final = 2**20
"""The least rate of a reader while others wait for it."""
GRACE_S: Final = 1.0
"""The time over which the rate is measured."""
WAIT_S: Final = 30.0
"""The time that a reader waits for others before it gets `Busy`."""
LOOK_S: Final = 0.25
"""The interval of checking readers while others wait for them."""

Taken = TypeVar("Taken")


class Outgoing(Protocol):
    """An answer on its way to a client."""

    def progress(self) -> tuple[float, int] | None:
        """Return the seconds since its first byte was available, and the bytes taken; None before."""

    def cut(self) -> None:
        """Abort it, and the connection with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadersPage:
    """The readers of a session.

    Attributes:
        readers: their number.
        held_bytes: the memory they hold: versions and copies.
        limit_bytes: the limit of that memory, for all kinds together.
        waiting: the number of those that wait for others.
        cut: the number of those that were cut off so far.
    """

    readers: int
    held_bytes: int
    limit_bytes: int
    waiting: int
    cut: int


@final
class ReadSlot:
    """The slot of one reader; released when its answer has been sent, or aborted."""

    __slots__ = ("_budget", "_group", "_key", "_mark", "outgoing", "rate")

    def __init__(self, budget: _KindBudget, key: object, group: _Group, outgoing: Outgoing | None) -> None:
        self._budget: _KindBudget | None = budget
        self._key = key
        self._group = group
        self.outgoing = outgoing
        self.rate = inf
        self._mark = (0.0, 0)
        group.slots[id(self)] = self

    def release(self) -> None:
        """Release the slot; a second call does nothing."""
        budget, self._budget = self._budget, None
        if budget is not None:
            budget.leave(self._key, self._group, self)

    def look(self) -> None:
        """Record the rate since the last check, in bytes per second, if that was at least `GRACE_S` ago."""
        progress = None if self.outgoing is None else self.outgoing.progress()
        if progress is not None and progress[0] - self._mark[0] >= GRACE_S:
            (before_s, before), self._mark = self._mark, progress
            self.rate = (progress[1] - before) / (progress[0] - before_s)


@dataclass(slots=True)
class _Group:
    """Readers of the same memory."""

    nbytes: int
    slots: dict[int, ReadSlot] = field(default_factory=dict)
    cut: bool = False

    @property
    def rate(self) -> float:
        """Return the rate of the fastest of them."""
        return max(slot.rate for slot in self.slots.values())


@dataclass(slots=True)
class _Waiting(Generic[Taken]):
    take: Callable[[], Taken | None]
    future: asyncio.Future[Taken]


@final
class _KindBudget:
    """The readers of one kind."""

    def __init__(self, limit: Callable[[], int], freed: Callable[[], None]) -> None:
        self.limit = limit
        self.groups: dict[object, _Group] = {}
        self.waiting: deque[_Waiting[object]] = deque()
        self.cut = 0
        self._freed = freed
        self._look: asyncio.TimerHandle | None = None

    @property
    def held_bytes(self) -> int:
        return sum(group.nbytes for group in self.groups.values())

    def enter(self, key: object, nbytes: int, outgoing: Outgoing | None, *, waited: bool) -> ReadSlot | None:
        group = self.groups.get(key)
        if group is None:
            fits = not self.groups or self.held_bytes + nbytes <= self.limit()
            if not fits or (self.waiting and not waited):
                return None
            group = self.groups[key] = _Group(nbytes)
        return ReadSlot(self, key, group, outgoing)

    def leave(self, key: object, group: _Group, slot: ReadSlot) -> None:
        group.slots.pop(id(slot), None)
        if not group.slots and self.groups.get(key) is group:
            del self.groups[key]
            if self.waiting:
                self._freed()

    def watch(self) -> None:
        """Cut off slow readers while others wait for them."""
        self._look = None
        if not self.waiting:
            return
        for group in self.groups.values():
            for slot in group.slots.values():
                slot.look()
        slowest = min(self.groups.values(), key=lambda group: group.rate, default=None)
        if slowest and slowest.rate < FAIR_BYTES_PER_S and not any(group.cut for group in self.groups.values()):
            slowest.cut = True
            for slot in [*slowest.slots.values()]:
                self.cut += 1
                if slot.outgoing is not None:
                    slot.outgoing.cut()
        self._look = asyncio.get_running_loop().call_later(LOOK_S, self.watch)

    def begin_watching(self) -> None:
        if self._look is None:
            self.watch()

    def end(self) -> None:
        """Drop references to the session, which would otherwise live until garbage collection."""
        self.limit, self._freed = int, _nothing
        if self._look is not None:
            self._look.cancel()
            self._look = None


def _nothing() -> None:
    """Do nothing."""


@final
class Readers:
    """Admit the readers of one session.

    Args:
        limit: returns the bytes that readers of a kind may keep.
        freed: run when readers of a kind wait and may fit; calls `admit`, in the session's turn.
    """

    def __init__(
        self, limit: Callable[[ReadKind], int], freed: Callable[[ReadKind], Coroutine[Any, Any, None]]
    ) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        kinds: tuple[ReadKind, ...] = ("pull", "answer", "copy")
        self._budgets = {
            kind: _KindBudget(lambda kind=kind: limit(kind), lambda kind=kind: self._begin(freed(kind)))  # type: ignore[misc]
            for kind in kinds
        }
        self._admitting = False

    @property
    def page(self) -> ReadersPage:
        """Return the present readers."""
        budgets = self._budgets.values()
        return ReadersPage(
            readers=sum(len(group.slots) for budget in budgets for group in budget.groups.values()),
            held_bytes=sum(budget.held_bytes for budget in budgets),
            limit_bytes=sum(budget.limit() for budget in budgets),
            waiting=sum(len(budget.waiting) for budget in budgets),
            cut=sum(budget.cut for budget in budgets),
        )

    def enter(self, kind: ReadKind, key: object, nbytes: int, outgoing: Outgoing | None) -> ReadSlot | None:
        """Return a slot, None if the reader has to wait.

        Args:
            kind: what kind of reader.
            key: equal for those who need the same memory.
            nbytes: how much that is.
            outgoing: its answer, if known; a reader without one is never cut off.
        """
        return self._budgets[kind].enter(key, nbytes, outgoing, waited=self._admitting)

    async def wait(self, kind: ReadKind, take: Callable[[], Taken | None], give_back: Callable[[Taken], None]) -> Taken:
        """Return the result of `take` as soon as it fits the budget.

        Args:
            kind: what kind of reader.
            take: called in the session's turn; enters, or returns None.
            give_back: takes a result that no reader waits for any more.

        Raises:
            Busy: others read for too long.
            FarstepError: what `take` raises.
        """
        await in_task()
        budget = self._budgets[kind]
        future: asyncio.Future[Taken] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(take, future)
        budget.waiting.append(waiting)  # type: ignore[arg-type]
        budget.begin_watching()
        try:
            await asyncio.wait({future}, timeout=WAIT_S)
        except asyncio.CancelledError:
            if future.done() and not future.exception():
                give_back(future.result())
            raise
        finally:
            if waiting in budget.waiting:
                budget.waiting.remove(waiting)  # type: ignore[arg-type]
        if future.done():
            return future.result()
        raise Busy(
            f"Others read this session, {budget.held_bytes} bytes of it in the same way, and are not done after "
            f"{WAIT_S:g} s.",
            remedy="Try again; --held-versions says how many versions may be read at once.",
            limit=budget.limit(),
        )

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def admit(self, kind: ReadKind) -> None:
        """Admit waiting readers, in their order, as far as there is room."""
        budget, self._admitting = self._budgets[kind], True
        try:
            while budget.waiting:
                waiting = budget.waiting[0]
                if not waiting.future.done():
                    try:
                        taken = waiting.take()
                    except Exception as exc:
                        waiting.future.set_exception(exc)
                    else:
                        if taken is None:
                            return
                        waiting.future.set_result(taken)
                budget.waiting.popleft()
        finally:
            self._admitting = False

    def close(self, error: Callable[[], Exception]) -> None:
        """Raise an error in all waiting readers: the session has ended."""
        for budget in self._budgets.values():
            budget.end()
            while budget.waiting:
                waiting = budget.waiting.popleft()
                if not waiting.future.done():
                    waiting.future.set_exception(error())
