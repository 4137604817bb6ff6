"""Keep one session on the disk: when a write may be acknowledged, and when a snapshot is due.

    none        nothing
    snapshot    a snapshot after so many steps or seconds                    an answer waits for nothing
    journal     os: events are in the kernel's memory before they happen     an answer waits for nothing
                group, always: an answer, and every reader, waits until the disk has what led to it

A snapshot is a copy that is made in a turn; its files are written while steps go on. It begins a segment of the
journal, and the segments that only older snapshots need go when it is complete.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, Final, final

from farstep.errors import FarstepError, NotDurable
from farstep.protocol.durability import Durability
from farstep_service.durability import journal as journals
from farstep_service.durability.archive import SessionArchive
from farstep_service.durability.recorder import Recorder, not_durable, waiting_push
from farstep_service.durability.snapshots import Position, Saved
from farstep_service.failpoints import reached
from farstep_service.keeping.due import Due
from farstep_service.keeping.place import Place
from farstep_service.session import Session
from farstep_service.sessions.acknowledging import Acknowledging
from farstep_service.sessions.turns import Turns
from farstep_service.tensors.contribution import Contribution

log = logging.getLogger("farstep.durability")

RETRY_S: Final = 1.0
"""Seconds between attempts to catch up with a journal that could not be written."""


@final
class Keeper(Acknowledging):
    """Keep one session.

    Args:
        session: the session; it is called within its turns only.
        place: where to.
        level: how.
        executor: waits for the disk.
        journal: what is written from now on; None for a level without one.
        predecessors: incarnations of the session of which acknowledged steps were lost.
        most_bytes: the largest size of a journal.
        clock: the session's.
        archive: the copy of the session in a store elsewhere; None for none.

    Attributes:
        level, place, predecessors: as above.
    """

    def __init__(
        self,
        session: Session,
        place: Place,
        level: Durability,
        executor: Executor,
        *,
        journal: journals.Journal | None,
        predecessors: tuple[str, ...] = (),
        most_bytes: int,
        clock: Callable[[], float],
        archive: SessionArchive | None = None,
    ) -> None:
        super().__init__(session, level, executor, journal)
        self._archive = archive
        self.predecessors = predecessors
        self.place = place
        self._clock = clock
        if self._recorder is not None and archive is not None:
            self._recorder.late = archive.late.append
        self._snapshotting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: Turns | None = None
        self._due = Due(session, level, place.storage, most_bytes)
        self._changed = False
        self._tried_s = -RETRY_S
        self._failed: Exception | None = None  # the last snapshot
        self._mending = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, turns: Turns) -> None:
        """Begin to watch the session, whose turns these are."""
        self._turns, self._clock = turns, turns.clock
        self._due.saved(self._session.version, self._clock())
        if self._archive is not None:
            self._archive.want()  # what the server before did not come to

    @property
    def archived_version(self) -> int | None:
        """Return the version of the newest snapshot in the archive; None for none."""
        return None if self._archive is None else self._archive.version

    # -- snapshots --------------------------------------------------------------------------------------------------

    async def room(self) -> float:
        """Wait for a snapshot that does not keep up, so that the journal may grow; return the seconds that took."""
        recorder = self._recorder
        if recorder is None:
            return 0.0
        if recorder.behind is not None:
            await self._catch_up()
            return 0.0
        if recorder.refused:
            self.mend(recorder)
        self._check_bound(recorder)
        if not self._snapshotting.locked() or recorder.journal.nbytes <= self._due.most_bytes():
            return 0.0
        began = time.perf_counter()
        async with self._snapshotting:
            pass
        return time.perf_counter() - began

    def journal_(self, contribution: Contribution) -> None:
        if self._recorder is not None:
            self._check_bound(self._recorder)
        super().journal_(contribution)

    def _check_bound(self, recorder: Recorder) -> None:
        """Refuse that the journal grows beyond its bound while no snapshot can be written.

        Raises:
            NotDurable: it would.
        """
        if isinstance(self._failed, OSError) and recorder.journal.nbytes > self._due.most_bytes():
            self.mend(recorder)
            raise not_durable(self._failed)

    def written(self) -> None:
        """Note that a write has happened; begin a snapshot if one is due."""
        if self._archive is not None:
            self._archive.written()
        if self._snapshotting.locked():
            self._changed = True
            return
        left_s = self._due.left_s(self._clock(), None if self._recorder is None else self._recorder.journal)
        if left_s == 0:
            self._begin_snapshot()
        elif left_s is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._begin_snapshot)

    def _go_on(self) -> None:
        """Look at what was written while nothing could be begun."""
        if self._changed and self._turns is not None and not self._turns.closed:
            self._changed = False
            self.written()

    def mend(self, recorder: Recorder) -> None:
        """Let a snapshot take the place of a journal that fills the disk or cannot be written; try until it does."""
        if recorder.behind is None:
            self._begin_snapshot()
        elif not self._mending:
            self._mending = True
            self._begin(self._mend(recorder))

    async def _mend(self, recorder: Recorder) -> None:
        try:
            while recorder.behind is not None and recorder is self._recorder:
                with suppress(NotDurable):
                    await self._catch_up()
                    return
                await asyncio.sleep(RETRY_S)
        finally:
            self._mending = False

    def _begin(self, work: Coroutine[Any, Any, object]) -> None:
        """Begin something in the background."""

        async def done() -> None:
            try:
                await work
            except (OSError, FarstepError) as exc:
                self._failed, self._tried_s = exc, time.monotonic()
                if self._timer is None and self._turns is not None:
                    self._timer = asyncio.get_running_loop().call_later(RETRY_S, self._begin_snapshot)
                log.error("session %s: a snapshot could not be written: %s", self._session.plan.name, exc)

        task = asyncio.get_running_loop().create_task(done())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _begin_snapshot(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        just_failed = self._failed is not None and time.monotonic() - self._tried_s < RETRY_S
        is_behind = self._recorder is not None and self._recorder.behind is not None
        is_open = self._turns is not None and not self._turns.closed
        if is_open and not just_failed and not is_behind and not self._snapshotting.locked():
            self._begin(self.snapshot())

    async def snapshot(self, *, clean: bool = False) -> bool:
        """Write a snapshot; return whether there was one to write.

        Args:
            clean: nothing happens to the session any more.

        Raises:
            OSError: it could not be written.
        """
        turns, session = self._turns, self._session
        assert turns is not None
        async with self._snapshotting:
            async with turns:
                if turns.closed and not clean:
                    return False
                saved = await turns.run(lambda: self._saved(clean=clean), lambda _: None, inline=False)
            if saved is None:
                return False
            version, at = saved.version, self._clock()
            await self._run(lambda: self._write(saved))
            self._due.saved(version, at)
            self._failed = None
        if not clean:
            self._go_on()
        log.debug("session %s: snapshot of version %d", session.plan.name, version)
        return True

    def _saved(self, *, clean: bool) -> Saved | None:
        """Return what the session is, in memory of its own, and begin a segment of the journal."""
        session, recorder = self._session, self._recorder
        record = session.record(pushes=False)
        if record.tensors.asked is not None:
            if recorder is not None or not clean:
                return None  # the next evaluation comes soon; the journal has what led here
            record = replace(record, tensors=replace(record.tensors, asked=None))
        position: Position | None = None
        waiting: tuple[list[Any], ...] = ()
        if recorder is not None:
            reached("session.rotate")
            position = recorder.rotate()
            waiting = tuple(waiting_push(head, payload) for head, payload in session.waiting())
        return Saved(
            incarnation=session.incarnation,
            predecessors=self.predecessors,
            coordinator=record.written,
            tensors=record.tensors,
            waiting=waiting,
            now=self._clock(),
            position=position,
            clean=clean,
        )

    def _write(self, saved: Saved, *, only: bool = False) -> None:
        journal = None if self._recorder is None else self._recorder.journal
        self.place.write(saved, journal, only=only or self._due.has_little_room())  # that makes room for the next
        if self._archive is not None:
            self._archive.want()

    # -- a disk that failed -----------------------------------------------------------------------------------------

    async def _catch_up(self) -> None:
        """Let a snapshot and a new journal take the place of one that is behind.

        Pushes that wait for others are taken back: what they brought may be lost.

        Raises:
            NotDurable: the disk still fails.
        """
        recorder, session, turns = self._recorder, self._session, self._turns
        assert recorder is not None
        assert turns is not None
        async with self._snapshotting:
            if recorder.behind is None:
                return
            if time.monotonic() - self._tried_s < RETRY_S:
                raise not_durable(recorder.behind)
            self._tried_s = time.monotonic()
            async with turns:
                session.journal = None  # what happens here is in the snapshot
                try:
                    turns.resolve(session.interrupt(self._clock()))
                    await self._run(self._anew)
                except OSError as exc:
                    recorder.behind = exc
                    raise not_durable(exc) from exc
                finally:
                    session.journal = recorder
            log.warning("session %s: a snapshot took the place of its journal", session.plan.name)

    def _anew(self) -> None:
        """Let a snapshot of the present take the place of what the journal holds.

        Raises:
            OSError: the disk still fails.
        """
        assert self._recorder is not None
        saved = self._saved(clean=False)
        if saved is None:
            self._session.give_up()  # its worker takes the step again
            saved = self._saved(clean=False)
        assert saved is not None
        self._write(saved, only=True)
        self._recorder.behind = None

    # -- history ----------------------------------------------------------------------------------------------------

    @property
    def journal(self) -> journals.Journal | None:
        """Return what is written; None for a level without a journal.

        Raises:
            NotDurable: it is not what the session is.
        """
        if self._recorder is None:
            return None
        if self._recorder.behind is not None:
            raise not_durable(self._recorder.behind)
        return self._recorder.journal

    @asynccontextmanager
    async def standing(self) -> AsyncIterator[None]:
        """Hold what is kept as it is: no snapshot is written, and no segment of the journal goes."""
        async with self._snapshotting:
            yield
        self._go_on()

    async def give_way(self, work: Callable[[], None]) -> None:
        """Let something else take the place of what is kept; the session is over then.

        Args:
            work: does it.

        Raises:
            NotDurable: the disk failed; then this session goes on.
        """
        recorder = self._recorder
        chain = b"" if recorder is None else recorder.journal.chain
        try:
            await self._run(work)
        except OSError as exc:
            if recorder is not None and recorder.journal.chain != chain:
                recorder.fall_behind(exc)
            raise not_durable(exc) from exc

    # -- the end ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Keep what is not in a snapshot yet, because the server ends."""
        if self._timer is not None:
            self._timer.cancel()
        try:
            if not await self.snapshot(clean=True):
                await self.kept()
        except (OSError, FarstepError) as exc:
            log.error("session %s: the last snapshot could not be written: %s", self._session.plan.name, exc)

    async def ended(self) -> None:
        """Return when nothing is written any more, after `stop`."""
        async with self._snapshotting:
            pass

    def stop(self) -> None:
        """Begin nothing any more: the session is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._session.journal = self._recorder = self._turns = None
