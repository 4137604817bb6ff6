"""Turns: one piece of work at a time on a session, in the right thread, and the outcomes of waiting writes.

Work on a small session runs on the event loop, other work in a thread: a thread hop costs more than a small step, and a
large step would block the event loop. The session's size decides, not the message's: the gradient of one segment can
make a step copy all the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextlib import suppress
from copy import copy
from itertools import chain
from typing import Any, Final, TypeVar, final

from farstep.errors import FarstepError, NotDurable, SessionLost
from farstep.protocol.messages import WriteName
from farstep_service.plan import Plan
from farstep_service.session import Outcome, Outcomes, Session
from farstep_service.sessions.answers import OVERHEAD_BYTES

INLINE_BYTES: Final = 1280 * 1024
"""Work on a session of fewer bytes than this is done on the event loop itself: it takes up to a millisecond with the
reference kernel and a quarter of one with a fused one, of which the hop to a thread and back would take half again."""
SEGMENT_COST_BYTES: Final = 512
"""The cost of a segment's bookkeeping in a step, as the bytes that take equally long."""

Result = TypeVar("Result")


@final
class Size:
    """What follows from the size of a session, counted once for each of its plans.

    Attributes:
        small: whether work on the session is done on the event loop.
        largest_body_bytes: the largest sensible body: parameters, every state field, indices and the framing.
    """

    def __init__(self, plan: Plan) -> None:
        layout = plan.layout
        step_bytes = plan.rule.step_bytes(layout, plan.groups)
        self.plan = plan
        self.small = step_bytes + SEGMENT_COST_BYTES * len(layout.segments) <= INLINE_BYTES
        one = layout.nbytes + 8 * len(layout.segments)
        self.largest_body_bytes = 10 * one + plan.rule.state_bytes(layout, plan.groups) + OVERHEAD_BYTES


async def run(
    executor: Executor, work: Callable[[], Result], abandoned: Callable[[Result], None], *, inline: bool
) -> Result:
    """Do work; return or raise only when it has ended, even if the caller was cancelled.

    Args:
        executor: runs large work.
        work: what to do.
        abandoned: takes the result in the place of a cancelled caller, since others may wait for it.
        inline: run it on the event loop.
    """
    if inline:
        return work()
    running = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        with suppress(FarstepError):
            abandoned(await running)
        raise
    finally:
        del running  # an error in it and this frame would keep each other alive, and the gradients


@final
class PendingOutcomes:
    """The pending outcomes of one session's writes: a retry waits for the same outcome."""

    def __init__(self) -> None:
        self._futures: dict[WriteName, list[asyncio.Future[Outcome]]] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def of(self, name: WriteName) -> asyncio.Future[Outcome]:
        """Return a future of the outcome of a write, one for each waiting request, which may be cancelled by itself."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._futures.setdefault(name, []).append(future)
        return future

    def resolve(self, outcomes: Outcomes) -> None:
        """Resolve the futures of decided writes."""
        for name, outcome in outcomes.items():
            for future in self._futures.pop(name, ()):
                if not future.done():
                    future.set_result(outcome)

    def end(self, error: Callable[[], FarstepError]) -> None:
        """Resolve all futures with an error of their own: nothing will be decided any more."""
        for future in chain.from_iterable(self._futures.values()):
            if not future.done():
                future.set_result(Outcome(error()))
        self._futures.clear()


OnDeadline = Callable[[], Coroutine[Any, Any, None]]


@final
class DeadlineTimer:
    """The timer of a session's next deadline, on the event loop.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_set(self) -> bool:
        """Return whether its deadline is set."""
        return self._timer is not None

    def set(self, deadline: float | None, on_deadline: OnDeadline) -> None:
        """Call `on_deadline` at this time of the clock, in place of the time set before; None for never."""
        self.cancel()
        if deadline is not None:
            delay_s = max(0.0, deadline - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._begin, on_deadline)

    def cancel(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self, on_deadline: OnDeadline) -> None:
        task = asyncio.get_running_loop().create_task(on_deadline())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _nothing() -> None:
    """Do nothing."""


@final
class Turns:
    """Serialise the work on a session, and resolve the outcomes of waiting writes; `async with` it for one turn.

    A turn does not end before the writes that it decided about on the way are resolved.

    Args:
        session: the session; called only by the holder of the turn.
        executor: runs large work.
        clock: monotonic seconds.

    Attributes:
        closed: the session was removed.
        leaving: the server is about to stop, and no write waits for others any more.
        settled: called after a tick, when the session may hold more or less than before.
    """

    def __init__(self, session: Session, executor: Executor, clock: Callable[[], float]) -> None:
        self._lock = asyncio.Lock()
        self.closed = False
        self.leaving = False
        self.settled: Callable[[], None] = _nothing
        self._over: Callable[[], FarstepError] | None = None
        self.clock = clock
        self._session = session
        self._executor = executor
        self._waiting = PendingOutcomes()
        self._timer = DeadlineTimer(clock)
        self._size = Size(session.plan)

    async def __aenter__(self) -> None:
        await self._lock.acquire()

    async def __aexit__(self, *error: object) -> None:
        try:
            if self._session.late and not self.closed:
                self.resolve({})
        finally:
            self._lock.release()

    @property
    def size(self) -> Size:
        """Return what follows from the size of the session as it is now."""
        if self._size.plan is not (plan := self._session.plan):
            self._size = Size(plan)
        return self._size

    @property
    def small(self) -> bool:
        """Return whether work on the session is done on the event loop."""
        return self.size.small

    def check_open(self) -> None:
        """Refuse work after the session was removed.

        Raises:
            SessionLost, StateRolledBack: the session was removed, or goes on as another life of it.
        """
        if self.closed:
            raise self.gone()

    def gone(self) -> FarstepError:
        """Return the error for a session that is over."""
        name = self._session.plan.name
        if self._over is not None:
            return self._over()
        return SessionLost(f"Session {name!r} was removed.", remedy="Join again to create a new one.")

    async def run(self, work: Callable[[], Result], abandoned: Callable[[Result], None], *, inline: bool) -> Result:
        """Do work on the session, within the caller's turn; see `run`."""
        return await run(self._executor, work, abandoned, inline=inline)

    def outcome_of(self, name: WriteName) -> asyncio.Future[Outcome]:
        """Return a future of the outcome of a write that waits for others."""
        return self._waiting.of(name)

    def resolve(self, outcomes: Outcomes) -> None:
        """Resolve the outcomes of writes, and set the timer to the next deadline."""
        if late := self._session.late:
            outcomes = late | outcomes
            late.clear()
        if self._waiting:
            self._waiting.resolve(outcomes)
        if self.leaving:
            try:
                self._waiting.resolve(self._session.interrupt(self.clock()))
            except NotDurable as exc:  # what is not written down has not happened; the answers say so
                error = exc
                self._waiting.end(lambda: copy(error))
        if (deadline := self._session.deadline) is not None or self._timer.is_set:
            self._timer.set(deadline, self._tick)

    async def _tick(self) -> None:
        async with self:
            if not self.closed:
                now = self.clock()
                self.resolve(await self.run(lambda: self._session.tick(now), self.resolve, inline=self.small))
                self.settled()

    async def interrupt(self) -> None:
        """Answer every waiting write, and from now on every write that would wait."""
        async with self:
            self.leaving = True
            if not self.closed:
                self.resolve({})

    def close(self, error: Callable[[], FarstepError] | None = None) -> None:
        """End the session, within the caller's turn; waiting writes get an error.

        Args:
            error: returns it; None for that of a session that was removed.
        """
        self.closed, self._over = True, error
        self.settled = _nothing
        self._timer.cancel()
        self._waiting.end(self.gone)
