"""A session in this process: one turn at a time, kernels off the event loop.

Work on a small session runs where it is, other work in a thread: a thread hop costs more than a small step, and a large
step would keep the event loop from answering anybody. The session's size decides, not the message's: the gradient of
one segment can make a step copy all the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any, cast

from farstep.consistency import Consistency
from farstep.errors import FarstepError, Fenced, InvalidRequest, OptionsDiffer, SessionLost, StepInterrupted
from farstep.growth import AppendHead
from farstep.messages import PushHead, PutHead, WriteName
from farstep.wire import to_ranges
from farstep_service.durability import Snapshot
from farstep_service.gradients import Contribution
from farstep_service.hosts.alarm import Alarm
from farstep_service.hosts.eager import in_task
from farstep_service.hosts.host import Answer, Host, Intake, Joined, Reader, Summary, View, WorkerPage
from farstep_service.hosts.narrowed import NarrowedView, Narrowings
from farstep_service.hosts.shared import Offer, Shared, refused
from farstep_service.hosts.views import ContentsIntake, CopiedView, HeldView, PushIntake
from farstep_service.hosts.work import run
from farstep_service.plan import Plan
from farstep_service.session import Outcome, Outcomes, Session
from farstep_service.store import Buffers, FlatBuffers

INLINE_BYTES = 1280 * 1024
"""Work on a session of fewer bytes than this is done on the event loop itself: it takes up to a millisecond with the
reference kernel and a quarter of one with a fused one, of which the hop to a thread and back would take half again."""
SEGMENT_COST_BYTES = 512
"""What a segment's bookkeeping adds to a step, as the bytes that take as long."""
NARROW_INLINE_BYTES = 4 * 1024 * 1024
"""Parameters of fewer bytes than this are narrowed on the event loop; it takes a fraction of a millisecond."""
INITIALISE_WITHIN_S = 60.0
"""How long the first contents may take before another worker is asked for them."""

READERS_WITHIN_S = 1.0
"""How long a step waits for readers of two versions, so that it does not need memory for a third."""

Room = Callable[[Plan, int], None]
"""Called before a session of that plan grows by so many bytes; raises if there is no room for them."""


def unbounded(plan: Plan, nbytes: int) -> None:
    """Have room for anything."""


class LocalHost(Host):
    """Keep a session in this process.

    Args:
        session: the session; nobody else may call it.
        executor: runs large work.
        clock: monotonic seconds.
        room: says whether the session may grow.
    """

    def __init__(
        self,
        session: Session,
        executor: Executor,
        clock: Callable[[], float] = time.monotonic,
        room: Room = unbounded,
    ) -> None:
        self.name = session.plan.name
        self.incarnation = session.incarnation
        self._session = session
        self._executor = executor
        self._clock = clock
        self._room = room
        self._coming_bytes = 0
        self._turn = asyncio.Lock()
        self._futures: dict[WriteName, asyncio.Future[Outcome]] = {}
        self._alarm = Alarm(clock)
        self._initialiser = ""
        self._initialising_until = -1.0
        self._closed = False
        self._leaving = False
        self._switched = False
        self._shared: dict[str, Shared] = {}
        self._released = asyncio.Event()
        self._narrowings = Narrowings(executor)
        self._sized: Plan | None = None
        self._fits = False

    @property
    def plan(self) -> Plan:
        return self._session.plan

    @property
    def switched(self) -> bool:
        return self._switched

    @property
    def parameter_bytes(self) -> int:
        return self.plan.layout.nbytes + self._coming_bytes

    @property
    def _small(self) -> bool:
        plan = self.plan
        if self._sized is not plan:
            step_bytes = plan.rule.step_bytes(plan.layout, plan.groups)
            self._fits = step_bytes + SEGMENT_COST_BYTES * len(plan.layout.segments) <= INLINE_BYTES
            self._sized = plan
        return self._fits

    # -- membership and options -------------------------------------------------------------------------------------

    async def join(self, worker: str, groups: int) -> Joined:
        async with self._turn:
            self._check_open()
            if (now := len(self.plan.groups)) != groups:
                raise OptionsDiffer(
                    f"Session {self.name!r} exists, but it has {now} param groups by now, not {groups}.",
                    remedy="Join with all of them.",
                    field="name",
                )
            epoch, outcomes = self._session.join(worker, self._clock())
            self._unshare()
            self._resolve(outcomes)
            initialised = self._session.initialised
            initialise = not initialised and (worker == self._initialiser or self._clock() >= self._initialising_until)
            if initialise:
                self._initialiser = worker
                self._initialising_until = self._clock() + INITIALISE_WITHIN_S
            return Joined(epoch, initialised, initialise, self._session.version)

    async def leave(self, worker: str, epoch: int) -> None:
        async with self._turn:
            self._resolve(self._session.leave(worker, epoch, self._clock()))
            self._unshare()

    async def worker(self, worker: str) -> WorkerPage:
        async with self._turn:
            return self._page(worker)

    async def summary(self) -> Summary:
        async with self._turn:
            session = self._session
            workers: dict[str, WorkerPage] = {}
            with suppress(StepInterrupted):  # a session whose step cannot be finished is still there to be seen
                workers = {name: self._page(name) for name in session.workers}
            groups = [group.to_options() for group in session.groups]
            nbytes = session.nbytes()
            nbytes["versions"] += self._narrowings.nbytes
            return Summary(session.version, session.initialised, groups, workers, nbytes)

    async def set_groups(self, changes: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        async with self._turn:
            self._check_open()
            self._resolve(self._session.set_groups(changes))
            return [group.to_options() for group in self._session.groups]

    async def set_consistency(self, mode: Consistency) -> None:
        async with self._turn:
            self._check_open()
            now = self._clock()
            outcomes = await run(
                self._executor,
                lambda: self._session.set_consistency(mode, now),
                self._resolve,
                inline=self._small,
            )
            self._switched = True
            self._resolve(outcomes)

    def _page(self, worker: str) -> WorkerPage:
        return WorkerPage(*self._session.position(worker), live=self._session.is_live(worker, self._clock()))

    # -- shared memory ----------------------------------------------------------------------------------------------

    @property
    def shared_bytes(self) -> int:
        return sum(each.nbytes for each in self._shared.values())

    async def share(self, worker: str, offer: Offer) -> None:
        async with self._turn:
            self._check_open()
            if self._session.position(worker)[0] != offer.epoch or not offer.epoch:
                raise Fenced(f"Epoch {offer.epoch} of worker {worker!r} is not the current one.", field="epoch")
            if self._session.layout_of(worker) is not self.plan.layout:
                raise refused("the worker does not know all param groups")
            self._shared.pop(worker, None)
            self._shared[worker] = Shared(offer, self.plan.layout)

    async def deliver(self, head: PushHead, view: View, spent: Intake | None) -> bool:
        shared = self._delivering(head)
        if shared is None or view.count != len(shared.layout.segments):
            return False
        copy_to, there = cast(HeldView, view).copy_to_, frozenset[int]()
        if isinstance(spent, PushIntake) and spent.contribution.copy is shared.parameters:
            there = spent.contribution.copied_since(view.version)
        await run(self._executor, lambda: copy_to(shared.parameters, there), lambda _: None, inline=self._small)
        return True

    def _delivering(self, head: PushHead) -> Shared | None:
        """Return the memory in which a push wants its answer, None if it wants it in a body."""
        shared = self._shared.get(head.name.worker)
        wanted = head.fill is not None and head.fill.deliver and shared is not None and shared.key == head.fill.area
        return shared if wanted else None

    def _copy_of(self, head: PushHead, contribution: Contribution) -> Buffers | None:
        """Return where the step of a push may write its answer: over its gradients, or into shared memory."""
        if head.wanted == "none":
            return None
        if head.wire_parameters is not None:
            return contribution.narrow() if head.wire_parameters == head.wire_gradients else None
        shared = self._delivering(head)
        return shared.parameters if shared is not None and shared.layout is contribution.layout else None

    def _gradients_in(self, head: PushHead, contribution: Contribution) -> FlatBuffers | None:
        """Return the shared memory that a push's gradients are in, None if they come in its body."""
        if head.fill is None:
            return None
        shared = self._shared.get(head.name.worker)
        if shared is None or shared.key != head.fill.area or shared.layout is not contribution.layout:
            raise InvalidRequest(
                f"Worker {head.name.worker!r} shares no such memory.", remedy="Send the gradients.", field="area"
            )
        return shared.gradients

    def _unshare(self) -> None:
        """Let go of the memory of epochs that are over."""
        position = self._session.position
        self._shared = {worker: each for worker, each in self._shared.items() if position(worker)[0] == each.epoch}

    # -- writes -----------------------------------------------------------------------------------------------------

    def begin_push(self, head: PushHead, body_bytes: int) -> Intake:
        self._check_open()
        self._session.check(head.name, head.incarnation)
        contribution = self._session.contribution(head)
        watch = self.plan.nonfinite != "allow"
        return PushIntake(contribution, body_bytes, self._gradients_in(head, contribution), watch=watch)

    async def push(self, head: PushHead, intake: Intake, fingerprint: str) -> Answer:
        contribution = cast(PushIntake, intake).contribution
        contribution.copy = self._copy_of(head, contribution)
        answer = await self._write(
            head.name, lambda: self._session.push(head, contribution, fingerprint, self._clock()), inline=self._small
        )
        check_s = contribution.check_s
        answer.times.update(check=check_s, barrier=max(0.0, answer.times["barrier"] - check_s))
        return answer

    def begin_put(self, head: PutHead, body_bytes: int) -> Intake:
        self._check_open()
        self._session.check(head.name, head.incarnation)
        return ContentsIntake(self._session.intake(head), body_bytes)

    async def put(self, head: PutHead, intake: Intake, fingerprint: str) -> Answer:
        contents = cast(ContentsIntake, intake).contents
        # Never inline: the first contents may wait for a kernel to be built.
        return await self._write(
            head.name, lambda: self._session.put(head, contents, fingerprint, self._clock()), inline=False
        )

    def begin_append(self, head: AppendHead, body_bytes: int) -> Intake:
        self._check_open()
        addition = self._session.addition(head)
        if self._session.grows(head):
            self._room(self.plan, addition.nbytes)
        return ContentsIntake(addition, body_bytes)

    async def append(self, head: AppendHead, intake: Intake, fingerprint: str) -> Answer:
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
            if self._session.crowded:
                await self._wait_for_memory()
            with self._room_for(coming()):
                outcomes = await run(self._executor, work, self._resolve, inline=inline)
            outcome = outcomes.get(name)
            future = None if outcome else self._futures.setdefault(name, asyncio.get_running_loop().create_future())
            self._resolve(outcomes)
            if self._leaving:
                self._resolve(self._session.interrupt(self._clock()))
        if outcome is None:
            assert future is not None
            outcome = await asyncio.shield(future)
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
    ) -> View:
        async with self._turn:
            self._check_open()
            held, outcomes = self._session.hold()
            if (who := reader or write) is not None:
                self._session.received(who.worker, who.epoch, self._clock())
            layout = self.plan.layout if write is None else self._session.layout_at(write)
            if outcomes:
                self._resolve(outcomes)
        known, count = len(layout.segments), len(held.buffers.layout.segments)
        chosen: Sequence[int] = range(known) if since is None else held.changed_since(since)
        if known < count and since is not None:
            chosen = [index for index in chosen if index < known]
        indices, ranges = (None, None) if len(chosen) == count else (chosen, to_ranges(chosen))
        if half is not None:
            gradients = spent.contribution if isinstance(spent, PushIntake) else None
            narrowed = await self._narrowings.of(
                held, half, chosen, gradients, inline=layout.nbytes <= NARROW_INLINE_BYTES
            )
            self._released.set()
            return NarrowedView(narrowed, chosen, ranges, self._released.set)
        if held.buffers.device.type == "cpu" or layout.nbytes <= INLINE_BYTES:
            return HeldView(held, indices, ranges, self._released.set)
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, HeldView, held, indices, ranges, self._released.set
        )

    async def contents(self, fields: Sequence[str], indices: Sequence[int] | None = None) -> View:
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
        async with self._turn:
            self._check_open()
            snapshot, outcomes = await run(
                self._executor, self._session.snapshot, lambda unasked: self._resolve(unasked[1]), inline=self._small
            )
            self._resolve(outcomes)
            return snapshot

    # -- inside -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _room_for(self, nbytes: int) -> Iterator[None]:
        """Count bytes that the session is going to grow by, if there is room for them."""
        if nbytes:
            self._room(self.plan, nbytes)
        self._coming_bytes = nbytes
        try:
            yield
        finally:
            self._coming_bytes = 0

    async def _wait_for_memory(self) -> None:
        """Let readers of two versions finish before a step makes a third; very slow ones cost memory instead."""
        await in_task()
        with suppress(TimeoutError):
            async with asyncio.timeout(READERS_WITHIN_S):
                while self._session.crowded:
                    self._released.clear()
                    await self._released.wait()

    def _resolve(self, outcomes: Outcomes) -> None:
        """Tell those who wait what became of their writes, and set the alarm to what is to be decided next."""
        for name, outcome in outcomes.items():
            future = self._futures.pop(name, None)
            if future is not None and not future.done():
                future.set_result(outcome)
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
        async with self._turn:
            self._leaving = True
            if not self._closed:
                self._resolve(self._session.interrupt(self._clock()))

    async def close(self) -> None:
        async with self._turn:
            self._closed = True
            self._alarm.cancel()
            for future in self._futures.values():
                if not future.done():
                    future.set_result(Outcome(self._gone()))
            self._futures.clear()
            self._shared.clear()
