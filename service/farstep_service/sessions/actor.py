"""The actor of one session: what its routes ask of it, one turn at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from copy import copy
from typing import Any, Final, TypeVar, cast, final

from farstep.errors import FarstepError, Fenced, NotDurable, OptionsDiffer
from farstep.protocol.consistency import Consistency
from farstep.protocol.growth import AppendHead
from farstep.protocol.hyper import Hyper
from farstep.protocol.messages import PushHead, PutHead, WriteName
from farstep_service.plan import Plan
from farstep_service.session import Outcomes, Session
from farstep_service.sessions.answers import Answer, Intake, Joined, Renewed, Summary, View, WorkerPage
from farstep_service.sessions.keeper import Keeper
from farstep_service.sessions.memory_budget import SessionMemory
from farstep_service.sessions.pages import Pages
from farstep_service.sessions.reads import Reads
from farstep_service.sessions.shared_memory import SharedMemories, SharedMemoryHandle, not_shared
from farstep_service.sessions.turns import Turns
from farstep_service.sessions.views import ContentsIntake, EncodedView, HeldView, PushIntake
from farstep_service.settings import HELD_VERSIONS

T = TypeVar("T")

INLINE_GROUPS: Final = 100
"""Param groups whose options are changed on the event loop; more take more than a millisecond."""


@final
class Actor:
    """Let one write at a time happen to a session, and acknowledge it; this is the only place that does.

    Args:
        session: the session; only the actor calls it.
        executor: runs large work.
        clock: monotonic seconds.
        share: its part of the memory of the server.
        versions: how many versions readers of one kind may keep; see `farstep_service.sessions.readers`.
        keeper: keeps it on the disk; None for memory only.

    Attributes:
        keeper: as above.
        reads: how its versions are read.
    """

    def __init__(
        self,
        session: Session,
        executor: Executor,
        clock: Callable[[], float] = time.monotonic,
        share: SessionMemory | None = None,
        versions: int = HELD_VERSIONS,
        keeper: Keeper | None = None,
    ) -> None:
        self.name = session.plan.name
        self.incarnation = session.incarnation
        self.keeper = keeper
        self._session = session
        self._share = share or SessionMemory()
        self._turns = Turns(session, executor, clock)
        self._kept = _kept_at_once if keeper is None else keeper.kept
        self.reads = Reads(session, self._turns, executor, versions, self._kept)
        self._pages = Pages(session, clock)
        self._shared_memories = SharedMemories()
        self._turns.settled = self._note_held
        if keeper is not None:
            keeper.begin(self._turns)

    @property
    def plan(self) -> Plan:
        """What the session is now; it grows by param groups."""
        return self._session.plan

    @property
    def options(self) -> Sequence[Hyper]:
        """The options of each param group that are in force."""
        return self._session.groups

    @property
    def switched(self) -> bool:
        """Whether its consistency mode is another than its workers joined with."""
        return self._session.switched

    @property
    def largest_body_bytes(self) -> int:
        """The bytes of the largest sensible body of a write."""
        return self._turns.size.largest_body_bytes

    @property
    def parameter_bytes(self) -> int:
        """The bytes of its parameters, those of a group that is being added included."""
        return self.plan.layout.nbytes + self._share.growing

    # -- membership and options -------------------------------------------------------------------------------------

    async def join(self, worker: str, groups: int, *, named: bool = True) -> Joined:
        """Open a new epoch of a worker that knows so many param groups.

        Args:
            named: its name was chosen, so that the order of names is the same in every run.

        Raises:
            OptionsDiffer: the session has grown since the worker's plan was compared with its own.
        """
        async with self._turns:
            self._turns.check_open()
            if (now := len(self.plan.groups)) != groups:
                raise OptionsDiffer(
                    f"Session {self.name!r} exists, but it has {now} param groups by now, not {groups}.",
                    remedy="Join with all of them.",
                    field="name",
                )
            epoch, outcomes = self._session.join(worker, self._turns.clock(), named=named)
            self._unshare()
            self._turns.resolve(outcomes)
            joined = Joined(epoch, self._session.initialised, self._session.initialises(worker), self._session.version)
        await self._kept()
        return joined

    async def leave(self, worker: str, epoch: int) -> None:
        """Give a worker's place up."""
        async with self._turns:
            self._turns.resolve(self._session.leave(worker, epoch, self._turns.clock()))
            self._unshare()
        await self._kept()

    async def renew(self, worker: str, epoch: int, incarnation: str) -> Renewed:
        """Renew a worker's lease without a write.

        Raises:
            SessionLost, Fenced: the worker joined another life of the session, or its epoch is over.
        """
        async with self._turns:
            self._turns.check_open()
            session, now = self._session, self._turns.clock()
            lapsed, live = session.renew(worker, epoch, incarnation, now)
            self._turns.resolve({})
            renewed = Renewed(lapsed, session.lease_s(worker, now), live, session.version, session.plan.consistency)
        await self._kept()  # report a version only when it cannot be lost any more
        return renewed

    async def worker(self, worker: str) -> WorkerPage:
        """Say where a worker stands."""
        async with self._turns:
            page = self._pages.worker(worker)
        await self._kept()  # a write is said to be committed when it cannot be lost any more
        return page

    async def workers(self, after: str, most: int) -> dict[str, WorkerPage]:
        """Say where the first `most` workers stand whose names come after one."""
        return await self._look(lambda: self._pages.workers(after, most))

    async def groups(self, first: int, most: int) -> list[dict[str, Any]]:
        """Return the options of `most` param groups from one on."""
        return await self._look(lambda: self._pages.options(first, most))

    async def summary(self, most: int = 0) -> Summary:
        """Describe the session as it is now, with the first `most` of its groups and workers."""
        return await self._look(lambda: self._pages.summary(most, self.reads))

    async def _look(self, look: Callable[[], T]) -> T:
        """Return what `look` finds once it is kept; of a session whose disk failed, without waiting."""
        async with self._turns:
            found = look()
        with suppress(NotDurable):
            await self._kept()
        return found

    async def set_groups(self, changes: Mapping[int, Mapping[str, Any]]) -> None:
        """Change options of param groups."""
        async with self._turns:
            self._turns.check_open()
            outcomes = await self._turns.run(
                lambda: self._session.set_groups(changes),
                self._turns.resolve,
                inline=len(changes) <= INLINE_GROUPS,
            )
            self._turns.resolve(outcomes)
        await self._kept()

    async def set_consistency(self, mode: Consistency) -> None:
        """Go on in another mode, from the next push on and for those that wait.

        Raises:
            SessionFull: there are more live workers than the mode has places for.
            InvalidOption: the optimizer does not go with the mode.
        """
        async with self._turns:
            self._turns.check_open()
            now = self._turns.clock()
            outcomes = await self._turns.run(
                lambda: self._session.set_consistency(mode, now),
                self._turns.resolve,
                inline=self._turns.small,
            )
            self._turns.resolve(outcomes)
        await self._kept()

    # -- shared memory ----------------------------------------------------------------------------------------------

    @property
    def shared_bytes(self) -> int:
        """The bytes of the memory that workers share with the session."""
        return self._shared_memories.nbytes

    async def share(self, worker: str, handle: SharedMemoryHandle) -> None:
        """Map memory of a worker, in the place of what it shared before, for as long as its epoch lasts.

        Raises:
            Fenced: the worker has another epoch.
            InvalidOption: it is not memory that can be shared.
        """
        async with self._turns:
            self._turns.check_open()
            if self._session.position(worker)[0] != handle.epoch or not handle.epoch:
                raise Fenced(f"Epoch {handle.epoch} of worker {worker!r} is not the current one.", field="epoch")
            if self._session.layout_of(worker) is not self.plan.layout:
                raise not_shared("the worker does not know all param groups")
            self._shared_memories.share(worker, handle, self.plan)
            self._note_held()

    async def deliver(self, head: PushHead, view: View, spent: Intake | None) -> bool:
        """Put parameters where a push wants them; return whether they are there, and need no body.

        Args:
            spent: the push's, whose step has put most of them there already.
        """
        shared = self._shared_memories.delivering(head)
        if shared is None or view.count != len(shared.layout.segments):
            return False
        if not isinstance(view, HeldView | EncodedView):
            return False
        copy_to, there = view.copy_to_, frozenset[int]()
        if isinstance(spent, PushIntake) and spent.contribution.copy is shared.parameters:
            there = spent.contribution.copied_since(view.version)
        await self._turns.run(lambda: copy_to(shared.parameters, there), lambda _: None, inline=self._turns.small)
        return True

    def _note_held(self) -> None:
        self._share.note(self._held_bytes())

    def _held_bytes(self) -> int:
        return self._session.held_bytes + self._shared_memories.nbytes + self.reads.nbytes

    def _unshare(self) -> None:
        """Let go of the memory of epochs that are over."""
        self._shared_memories.keep_only(lambda worker: self._session.position(worker)[0])
        self._note_held()

    # -- writes -----------------------------------------------------------------------------------------------------

    def begin_push(self, head: PushHead, body_bytes: int) -> Intake:
        """Check a push's header and return memory for its payload."""
        self._turns.check_open()
        self._session.check(head.name, head.incarnation)
        contribution = self._session.contribution(head)
        if self.keeper is not None:
            self.keeper.journal_(contribution)
        watch = self.plan.nonfinite != "allow"
        return PushIntake(contribution, body_bytes, self._shared_memories.gradients_in(head, contribution), watch=watch)

    async def push(self, head: PushHead, intake: Intake, fingerprint: str) -> Answer:
        """Take a complete push in and wait for what becomes of it."""
        contribution = cast(PushIntake, intake).contribution
        contribution.copy = self._shared_memories.copy_of(head, contribution)
        session, clock = self._session, self._turns.clock
        answer = await self._write(
            head.name, lambda: session.push(head, contribution, fingerprint, clock()), inline=self._turns.small
        )
        check_s = contribution.check_s
        answer.times.update(check=check_s, barrier=max(0.0, answer.times["barrier"] - check_s))
        return answer

    def begin_put(self, head: PutHead, body_bytes: int) -> Intake:
        """Check the header of new contents and return memory for their payload."""
        self._turns.check_open()
        self._session.check(head.name, head.incarnation)
        return ContentsIntake(self._session.intake(head), body_bytes)

    async def put(self, head: PutHead, intake: Intake, fingerprint: str) -> Answer:
        """Replace contents."""
        contents = cast(ContentsIntake, intake).contents
        # Never inline: the first contents may wait for a kernel to be built.
        return await self._write(
            head.name, lambda: self._session.put(head, contents, fingerprint, self._turns.clock()), inline=False
        )

    def begin_append(self, head: AppendHead, body_bytes: int) -> Intake:
        """Check the header of a param group and return memory for its parameters."""
        self._turns.check_open()
        addition = self._session.addition(head)
        if self._session.grows(head):
            self._share.check_growth(self.plan, addition.nbytes)
        return ContentsIntake(addition, body_bytes)

    async def append(self, head: AppendHead, intake: Intake, fingerprint: str) -> Answer:
        """Grow by a param group, or note that a worker knows it."""
        contents = cast(ContentsIntake, intake).contents

        def coming() -> int:
            return contents.nbytes if self._session.grows(head) else 0

        return await self._write(
            head.name,
            lambda: self._session.append(head, contents, fingerprint, self._turns.clock()),
            inline=False,
            coming=coming,
        )

    async def _write(
        self, name: WriteName, work: Callable[[], Outcomes], *, inline: bool, coming: Callable[[], int] = int
    ) -> Answer:
        asked, kept_s, keeper = time.perf_counter(), 0.0, self.keeper
        if keeper is not None:
            kept_s = await keeper.room()
        async with self._turns:
            began = time.perf_counter()
            self._turns.check_open()
            session, grows = self._session, coming()
            takes = session.coming_bytes(grows)
            self._share.expect(session.plan, grows, takes, session.forget_base, self._held_bytes)
            try:
                outcomes = work() if inline else await self._turns.run(work, self._turns.resolve, inline=False)
            finally:
                self._share.settle(self._held_bytes())
            outcome = outcomes.get(name)
            future = None if outcome else self._turns.outcome_of(name)
            self._turns.resolve(outcomes)
        if outcome is None:
            assert future is not None
            outcome = await future
        ended = time.perf_counter()
        if keeper is not None:
            keeper.written()
            kept_s += await keeper.kept()
        if isinstance(outcome.result, FarstepError):
            raise copy(outcome.result)  # each of those who wait raises its own
        times = {
            "queue": began - asked,
            "barrier": max(0.0, ended - began - outcome.kernel_s),
            "kernel": outcome.kernel_s,
        }
        if keeper is not None:
            times["journal"] = kept_s
        return Answer(outcome.result, outcome.duplicate, times)

    # -- the end ----------------------------------------------------------------------------------------------------

    async def interrupt(self) -> None:
        """Answer every push that waits, and every one that would from now on, because the server is about to end."""
        await self._turns.interrupt()

    @property
    def archived_version(self) -> int | None:
        """Return the version of the newest snapshot that is in the server's archive; None for none."""
        return None if self.keeper is None else self.keeper.archived_version

    async def end(self) -> None:
        """End the session with its server: what is to be kept of it is kept."""
        if self.keeper is not None:
            await self.keeper.close()
        await self.close()

    async def close(self) -> None:
        """End the session; those who wait are told so."""
        async with self._turns:
            self._over()
        if self.keeper is not None:
            await self.keeper.ended()

    async def give_way(self, work: Callable[[], None], error: Callable[[], FarstepError]) -> None:
        """End this life of the session once another one is written down; those who wait get an error.

        Raises:
            NotDurable: the disk failed; then this life goes on.
        """
        async with self._turns:
            self._turns.check_open()
            assert self.keeper is not None
            await self.keeper.give_way(work)
            self._over(error)

    def _over(self, error: Callable[[], FarstepError] | None = None) -> None:
        if self.keeper is not None:
            self.keeper.stop()
        self._turns.close(error)
        self.reads.close()
        self._shared_memories.clear()
        self._share.note(0)


async def _kept_at_once() -> float:
    """Wait for nothing: the session is kept in memory only."""
    return 0.0
