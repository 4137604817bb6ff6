"""The actor of one session: one turn at a time, kernels off the event loop.

Work on a small session runs where it is, other work in a thread: a thread hop costs more than a small step, and a large
step would keep the event loop from answering anybody. The session's size decides, not the message's: the gradient of
one segment can make a step copy all the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from copy import copy
from itertools import islice
from typing import Any, Final, cast, final

from farstep.consistency import Consistency
from farstep.errors import FarstepError, Fenced, OptionsDiffer, SessionLost, StepInterrupted
from farstep.growth import AppendHead
from farstep.hyper import Hyper
from farstep.messages import PushHead, PutHead, WriteName
from farstep.wire import to_ranges
from farstep_service.durability import Snapshot
from farstep_service.plan import Plan
from farstep_service.session import Outcomes, Session
from farstep_service.sessions.alarm import Alarm
from farstep_service.sessions.answers import Answer, Intake, Joined, Reader, Renewed, Summary, View, WorkerPage
from farstep_service.sessions.narrowed import NarrowedView
from farstep_service.sessions.readers import Kind, Outgoing, Readers, Seat
from farstep_service.sessions.reads import Views, chosen_of, cost_of
from farstep_service.sessions.room import Share
from farstep_service.sessions.shared import Offer, refused
from farstep_service.sessions.shared_memory import Areas
from farstep_service.sessions.turns import Size, run
from farstep_service.sessions.views import ContentsIntake, CopiedView, HeldView, PushIntake
from farstep_service.sessions.waiting import Waiting
from farstep_service.settings import HELD_VERSIONS
from farstep_service.store import Held

INLINE_GROUPS: Final = 100
"""Param groups whose options are changed on the event loop; more take more than a millisecond."""


@final
class Actor:
    """Let one write at a time happen to a session, and acknowledge it; this is the only place that does.

    Args:
        session: the session; nobody else may call it.
        executor: runs large work.
        clock: monotonic seconds.
        share: its part of the memory of the server.
        versions: how many versions readers of one kind may keep; see `farstep_service.sessions.readers`.
    """

    def __init__(
        self,
        session: Session,
        executor: Executor,
        clock: Callable[[], float] = time.monotonic,
        share: Share | None = None,
        versions: int = HELD_VERSIONS,
    ) -> None:
        self.name = session.plan.name
        self.incarnation = session.incarnation
        self._session = session
        self._executor = executor
        self._clock = clock
        self._share = share or Share()
        self._turn = asyncio.Lock()
        self._waiting = Waiting()
        self._alarm = Alarm(clock)
        self._closed = False
        self._leaving = False
        self._areas = Areas()
        self._views = Views(executor)
        self._versions = versions
        self._readers = Readers(self._read_bytes, self._make_room)
        self._size = Size()

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
    def parameter_bytes(self) -> int:
        """The bytes of its parameters, those of a group that is being added included."""
        return self.plan.layout.nbytes + self._share.growing

    @property
    def _small(self) -> bool:
        return self._size.is_small(self._session.plan)

    # -- membership and options -------------------------------------------------------------------------------------

    async def join(self, worker: str, groups: int, *, named: bool = True) -> Joined:
        """Open a new epoch of a worker that knows so many param groups.

        Args:
            named: its name was chosen, so that the order of names is the same in every run.

        Raises:
            OptionsDiffer: the session has grown since the worker's plan was compared with its own.
        """
        async with self._turn:
            self._check_open()
            if (now := len(self.plan.groups)) != groups:
                raise OptionsDiffer(
                    f"Session {self.name!r} exists, but it has {now} param groups by now, not {groups}.",
                    remedy="Join with all of them.",
                    field="name",
                )
            epoch, outcomes = self._session.join(worker, self._clock(), named=named)
            self._unshare()
            self._resolve(outcomes)
            return Joined(epoch, self._session.initialised, self._session.initialises(worker), self._session.version)

    async def leave(self, worker: str, epoch: int) -> None:
        """Give a worker's place up."""
        async with self._turn:
            self._resolve(self._session.leave(worker, epoch, self._clock()))
            self._unshare()

    async def renew(self, worker: str, epoch: int, incarnation: str) -> Renewed:
        """Renew a worker's lease without a write.

        Raises:
            SessionLost, Fenced: the worker joined another life of the session, or its epoch is over.
        """
        async with self._turn:
            self._check_open()
            session, now = self._session, self._clock()
            lapsed, live = session.renew(worker, epoch, incarnation, now)
            return Renewed(lapsed, session.lease_s(worker, now), live, session.version, session.plan.consistency)

    async def worker(self, worker: str) -> WorkerPage:
        """Say where a worker stands."""
        async with self._turn:
            return self._page(worker)

    async def workers(self, after: str, most: int) -> dict[str, WorkerPage]:
        """Say where the first `most` workers stand whose names come after one."""
        async with self._turn:
            return self._pages(after, most)

    async def groups(self, first: int, most: int) -> list[dict[str, Any]]:
        """Return the options of `most` param groups from one on."""
        async with self._turn:
            return self._options(first, most)

    async def summary(self, most: int = 0) -> Summary:
        """Describe the session as it is now, with the first `most` of its groups and workers."""
        async with self._turn:
            session = self._session
            groups, workers = self._options(0, most), self._pages("", most)
            nbytes = session.nbytes()
            nbytes["versions"] += self._views.nbytes
            return Summary(
                version=session.version,
                initialised=session.initialised,
                groups=groups,
                group_count=len(session.groups),
                workers=workers,
                worker_count=session.worker_count,
                bytes=nbytes,
                readers=self._readers.page,
            )

    async def set_groups(self, changes: Mapping[int, Mapping[str, Any]]) -> None:
        """Change options of param groups."""
        async with self._turn:
            self._check_open()
            outcomes = await run(
                self._executor,
                lambda: self._session.set_groups(changes),
                self._resolve,
                inline=len(changes) <= INLINE_GROUPS,
            )
            self._resolve(outcomes)

    async def set_consistency(self, mode: Consistency) -> None:
        """Go on in another mode, from the next push on and for those that wait.

        Raises:
            SessionFull: there are more live workers than the mode has places for.
            InvalidOption: the optimizer does not go with the mode.
        """
        async with self._turn:
            self._check_open()
            now = self._clock()
            outcomes = await run(
                self._executor,
                lambda: self._session.set_consistency(mode, now),
                self._resolve,
                inline=self._small,
            )
            self._resolve(outcomes)

    def _options(self, first: int, most: int) -> list[dict[str, Any]]:
        return [group.to_options() for group in islice(self._session.groups, first, first + most)]

    def _pages(self, after: str, most: int) -> dict[str, WorkerPage]:
        with suppress(StepInterrupted):  # a session whose step cannot be finished is still there to be seen
            return {name: self._page(name) for name in self._session.workers_after(after, most)}
        return {}

    def _page(self, worker: str) -> WorkerPage:
        return WorkerPage(*self._session.position(worker), lease_s=self._session.lease_s(worker, self._clock()))

    # -- shared memory ----------------------------------------------------------------------------------------------

    @property
    def shared_bytes(self) -> int:
        """The bytes of the memory that workers share with the session."""
        return self._areas.nbytes

    async def share(self, worker: str, offer: Offer) -> None:
        """Map memory of a worker, in the place of what it shared before, for as long as its epoch lasts.

        Raises:
            Fenced: the worker has another epoch.
            InvalidOption: it is not memory that can be shared.
        """
        async with self._turn:
            self._check_open()
            if self._session.position(worker)[0] != offer.epoch or not offer.epoch:
                raise Fenced(f"Epoch {offer.epoch} of worker {worker!r} is not the current one.", field="epoch")
            if self._session.layout_of(worker) is not self.plan.layout:
                raise refused("the worker does not know all param groups")
            self._areas.share(worker, offer, self.plan)
            self._share.note(self._held_bytes())

    async def deliver(self, head: PushHead, view: View, spent: Intake | None) -> bool:
        """Put parameters where a push wants them; return whether they are there, and need no body.

        Args:
            spent: the push's, whose step has put most of them there already.
        """
        shared = self._areas.delivering(head)
        if shared is None or view.count != len(shared.layout.segments):
            return False
        copy_to, there = cast(HeldView | NarrowedView, view).copy_to_, frozenset[int]()
        if isinstance(spent, PushIntake) and spent.contribution.copy is shared.parameters:
            there = spent.contribution.copied_since(view.version)
        await run(self._executor, lambda: copy_to(shared.parameters, there), lambda _: None, inline=self._small)
        return True

    def _held_bytes(self) -> int:
        return self._session.held_bytes + self._areas.nbytes + self._views.nbytes

    def _unshare(self) -> None:
        """Let go of the memory of epochs that are over."""
        self._areas.keep_only(lambda worker: self._session.position(worker)[0])
        self._share.note(self._held_bytes())

    # -- writes -----------------------------------------------------------------------------------------------------

    def begin_push(self, head: PushHead, body_bytes: int) -> Intake:
        """Check a push's header and return memory for its payload."""
        self._check_open()
        self._session.check(head.name, head.incarnation)
        contribution = self._session.contribution(head)
        watch = self.plan.nonfinite != "allow"
        return PushIntake(contribution, body_bytes, self._areas.gradients_in(head, contribution), watch=watch)

    async def push(self, head: PushHead, intake: Intake, fingerprint: str) -> Answer:
        """Take a complete push in and wait for what becomes of it."""
        contribution = cast(PushIntake, intake).contribution
        contribution.copy = self._areas.copy_of(head, contribution)
        answer = await self._write(
            head.name, lambda: self._session.push(head, contribution, fingerprint, self._clock()), inline=self._small
        )
        check_s = contribution.check_s
        answer.times.update(check=check_s, barrier=max(0.0, answer.times["barrier"] - check_s))
        return answer

    def begin_put(self, head: PutHead, body_bytes: int) -> Intake:
        """Check the header of new contents and return memory for their payload."""
        self._check_open()
        self._session.check(head.name, head.incarnation)
        return ContentsIntake(self._session.intake(head), body_bytes)

    async def put(self, head: PutHead, intake: Intake, fingerprint: str) -> Answer:
        """Replace contents."""
        contents = cast(ContentsIntake, intake).contents
        # Never inline: the first contents may wait for a kernel to be built.
        return await self._write(
            head.name, lambda: self._session.put(head, contents, fingerprint, self._clock()), inline=False
        )

    def begin_append(self, head: AppendHead, body_bytes: int) -> Intake:
        """Check the header of a param group and return memory for its parameters."""
        self._check_open()
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
            lambda: self._session.append(head, contents, fingerprint, self._clock()),
            inline=False,
            coming=coming,
        )

    async def _write(
        self, name: WriteName, work: Callable[[], Outcomes], *, inline: bool, coming: Callable[[], int] = int
    ) -> Answer:
        asked = time.perf_counter()
        async with self._turn:
            began = time.perf_counter()
            self._check_open()
            session, grows = self._session, coming()
            takes = session.coming_bytes(grows)
            with self._share.by(self.plan, grows, takes, session.forget_base, self._held_bytes):
                outcomes = await run(self._executor, work, self._resolve, inline=inline)
            outcome = outcomes.get(name)
            future = None if outcome else self._waiting.of(name)
            self._resolve(outcomes)
            if self._leaving:
                self._resolve(self._session.interrupt(self._clock()))
        if outcome is None:
            assert future is not None
            outcome = await future
        ended = time.perf_counter()
        if isinstance(outcome.result, FarstepError):
            raise copy(outcome.result)  # each of those who wait raises its own
        times = {
            "queue": began - asked,
            "barrier": max(0.0, ended - began - outcome.kernel_s),
            "kernel": outcome.kernel_s,
        }
        return Answer(outcome.result, outcome.duplicate, times)

    # -- reads ------------------------------------------------------------------------------------------------------

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
        kind: Kind = "pull" if write is None else "answer"

        def take() -> tuple[Held, Sequence[int], Seat] | None:
            self._check_open()
            held, outcomes = self._session.hold()
            if outcomes:
                self._resolve(outcomes)
            layout = self.plan.layout if write is None else self._session.layout_at(write)
            chosen = chosen_of(held, layout, since)
            seat = self._readers.enter(kind, *cost_of(held, half, chosen, spent), outgoing)
            if seat is None:
                held.release()
                return None
            if (who := reader or write) is not None:
                self._session.received(who.worker, who.epoch, self._clock())
            return held, chosen, seat

        def give_back(taken: tuple[Held, Sequence[int], Seat]) -> None:
            taken[0].release()
            taken[2].release()

        async with self._turn:
            taken = take()
        if taken is None:
            taken = await self._readers.wait(kind, take, give_back)
        held, chosen, seat = taken
        try:
            return await self._views.of(held, half, chosen, spent, seat.release)
        except BaseException:
            seat.release()
            raise

    @asynccontextmanager
    async def copying(self, nbytes: int, outgoing: Outgoing | None) -> AsyncIterator[None]:
        """Wait until so many bytes of the session may be copied, and count them while the copy is being sent.

        Raises:
            Busy: others read for too long.
        """

        def take() -> Seat | None:
            self._check_open()
            return self._readers.enter("copy", object(), nbytes, outgoing)

        seat = take()
        if seat is None:
            seat = await self._readers.wait("copy", take, Seat.release)
        try:
            yield
        finally:
            seat.release()

    def _read_bytes(self, kind: Kind) -> int:
        """Return the bytes that readers of a kind may keep."""
        fields = 1 + len(self.plan.rule.tensor_fields) if kind == "copy" else 1
        return self._versions * self.plan.layout.nbytes * fields

    async def _make_room(self, kind: Kind) -> None:
        """Let readers in who wait for those who have just left."""
        async with self._turn:
            self._readers.admit(kind)

    async def contents(self, fields: Sequence[str], indices: Sequence[int] | None = None) -> View:
        """Copy fields of the current version, of some segments or of all."""
        async with self._turn:
            self._check_open()
            contents, outcomes = await run(
                self._executor,
                lambda: self._session.copy(fields, indices),
                lambda unasked: self._resolve(unasked[1]),
                inline=self._small,
            )
            self._resolve(outcomes)
            count = len(self.plan.layout.segments)
            return CopiedView(contents, self._session.version, count, None if indices is None else to_ranges(indices))

    async def snapshot(self) -> Snapshot:
        """Copy all of the current version, with the options in force at it."""
        async with self._turn:
            self._check_open()
            snapshot, outcomes = await run(
                self._executor, self._session.snapshot, lambda unasked: self._resolve(unasked[1]), inline=self._small
            )
            self._resolve(outcomes)
            return snapshot

    # -- inside -----------------------------------------------------------------------------------------------------

    def _resolve(self, outcomes: Outcomes) -> None:
        """Tell those who wait what became of their writes, and set the alarm to what is to be decided next."""
        self._waiting.resolve(outcomes)
        self._alarm.set(self._session.deadline, self._tick)

    async def _tick(self) -> None:
        async with self._turn:
            if not self._closed:
                now = self._clock()
                outcomes = await run(self._executor, lambda: self._session.tick(now), self._resolve, inline=self._small)
                self._resolve(outcomes)

    def _check_open(self) -> None:
        if self._closed:
            raise self._gone()

    def _gone(self) -> SessionLost:
        return SessionLost(f"Session {self.name!r} was removed.", remedy="Join again to create a new one.")

    async def interrupt(self) -> None:
        """Answer every push that waits, and every one that would from now on, because the server is about to end."""
        async with self._turn:
            self._leaving = True
            if not self._closed:
                self._resolve(self._session.interrupt(self._clock()))

    async def close(self) -> None:
        """End the session; whoever waits is told so."""
        async with self._turn:
            self._closed = True
            self._alarm.cancel()
            self._waiting.end(self._gone)
            self._readers.close(self._gone)
            self._areas.clear()
            self._share.note(0)
