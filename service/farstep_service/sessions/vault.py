"""The sessions of a server that are kept in its data directory.

open      the directory is ours alone; which sessions there are
create    a session that is kept from its beginning
recover   one after the other comes back, while those that are back already serve
remove    a session and its files
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from typing import Final, TypeVar, final

from farstep.errors import FarstepError, InternalError, Recovering
from farstep.protocol.durability import Journal
from farstep_service.durability import journal as journals
from farstep_service.durability.archive import Archiver, SessionArchive
from farstep_service.durability.directory import DataDirectory
from farstep_service.durability.objects import open_objects
from farstep_service.durability.recorder import not_durable
from farstep_service.durability.segments import NO_CHAIN
from farstep_service.durability.snapshots import Position, Saved, damaged_file, write_snapshot
from farstep_service.failpoints import reached
from farstep_service.keeping.journal_size import begin_journal
from farstep_service.keeping.place import Place
from farstep_service.keeping.recovery import Progress, Recovered, newest, recover
from farstep_service.kernels import Kernels
from farstep_service.session import Session
from farstep_service.sessions.keeper import Keeper
from farstep_service.settings import Settings

log = logging.getLogger("farstep.durability")

T = TypeVar("T")

DISK_THREADS: Final = 4
RECOVER_AT_ONCE: Final = 2


@dataclass(slots=True)
class Absent:
    """A session that is in the directory, and not there yet, or not at all.

    Attributes:
        folder: where it is.
        progress: how far its recovery is.
        error: why it cannot be used; None while it may come back.
    """

    folder: str
    progress: Progress = field(default_factory=lambda: Progress(time.monotonic()))
    error: FarstepError | None = None


@final
class Vault:
    """Keep the sessions of one server.

    Args:
        settings: the data directory, where copies of it go, and the bounds of journals.
        clock: monotonic seconds.

    Raises:
        InvalidOption: the directory cannot be used, or the archive not; see `DataDirectory` and `open_objects`.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._archiver = Archiver(open_objects(settings.archive)) if settings.archive else None
        self.directory = DataDirectory(settings.data_dir, f"the farstep server with process id {os.getpid()}")
        self._storage = self.directory.storage
        self._archives: dict[str, SessionArchive] = {}
        self._disk = ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="farstep-disk")
        self.absent: dict[str, Absent] = {}
        self._folders: dict[str, str] = {}
        self._ending = False

    @property
    def executor(self) -> Executor:
        """Return what waits for the disk."""
        return self._disk

    def look(self) -> None:
        """Find out which sessions there are."""
        for folder in self.directory.folders():
            try:
                name = newest(self._storage, folder).said["name"]
            except (FarstepError, OSError) as exc:
                log.error("%s cannot be read, and is left alone: %s", folder, exc)
                continue
            if (other := self.absent.get(name)) is not None:
                log.error("%s holds another session %r than %s, and is left alone", folder, name, other.folder)
                continue
            self.absent[name] = Absent(folder)
        if self.absent:
            log.info("%d sessions are recovered from %s", len(self.absent), self.directory.path)

    def check(self, name: str) -> None:
        """Refuse what is asked of a session that is not back.

        Raises:
            Recovering: it is coming back.
            DamagedJournal: it cannot; see `recover`.
        """
        absent = self.absent.get(name)
        if absent is None:
            return
        if absent.error is not None:
            raise copy(absent.error)
        progress = absent.progress
        left_s = round(min(60.0, progress.left_s()), 1)
        raise Recovering(
            f"Session {name!r} is being recovered from the server's disk: {progress.done} of {progress.events} events.",
            remedy=f"Try again in {left_s:g} s.",
            retry_after_s=left_s,
        )

    async def recover(self, kernels: Callable[[str], Kernels], back: Callable[[Session, Keeper, float], None]) -> None:
        """Bring all sessions back, and call `back` with each, its keeper and the time of its clock."""
        began, waiting = time.monotonic(), asyncio.Semaphore(RECOVER_AT_ONCE)

        async def one(name: str, absent: Absent) -> None:
            async with waiting:
                if self._ending:
                    return
                absent.progress.began = time.monotonic()
                try:
                    recovered = await asyncio.get_running_loop().run_in_executor(
                        self._disk,
                        lambda: recover(
                            self._storage,
                            absent.folder,
                            absent.progress,
                            kernels=kernels,
                            device=self._settings.device,
                            reference=self._settings.replay == "reference",
                        ),
                    )
                    keeper, clock_now = self.keeper_of(recovered), recovered.now
                    self._folders[name] = absent.folder
                    back(recovered.session, keeper, clock_now)
                    del self.absent[name]
                except FarstepError as exc:
                    log.error("session %s is not there: %s", name, exc)
                    absent.error = exc
                except OSError as exc:
                    log.error("session %s is not there: %s", name, exc)
                    file = f"{absent.folder}/{os.path.basename(exc.filename or '')}"
                    absent.error = damaged_file(file, f"it cannot be read or written ({exc.strerror})")
                except Exception as exc:
                    log.error("session %s is not there", name, exc_info=exc)
                    absent.error = InternalError(
                        f"Session {name!r} could not be recovered ({type(exc).__name__}).",
                        remedy="Report it with the server's log; its files are untouched.",
                    )

        count = len(self.absent)
        await asyncio.gather(*(one(name, absent) for name, absent in [*self.absent.items()]))
        if count:
            log.info(
                "%d of %d sessions are back after %.1f s", count - len(self.absent), count, time.monotonic() - began
            )

    async def create(self, session: Session) -> Keeper:
        """Keep a session from its beginning.

        Raises:
            NotDurable: the disk has no room for it.
        """
        try:
            recovered = await self._run(lambda: self._created(session))
        except OSError as exc:
            raise not_durable(exc) from exc
        self._folders[session.plan.name] = recovered.place.folder
        return self.keeper_of(recovered)

    def _created(self, session: Session) -> Recovered:
        level, storage, folder = session.plan.durability, self._storage, self.directory.new_folder()
        assert level is not None
        journal: journals.Journal | None = None
        position: Position | None = None
        record = session.record(pushes=False)
        try:
            if isinstance(level, Journal):
                journal = begin_journal(storage, folder, level.sync, session.plan)
                position = Position(0, NO_CHAIN, journal.segment)
            reached("session.create.before")
            saved = Saved(
                incarnation=session.incarnation,
                predecessors=(),
                coordinator=record.written,
                tensors=record.tensors,
                now=self._clock(),
                position=position,
            )
            write_snapshot(storage, folder, 1, saved)
            storage.sync_names("sessions")
            reached("session.create.after")
        except OSError:
            storage.remove(folder)
            raise
        first = None if position is None else position.segment
        return Recovered(session, Place(storage, folder, [(1, first)], 1), level, journal, (), saved.now)

    def keeper_of(self, recovered: Recovered) -> Keeper:
        """Return what keeps a session from now on."""
        archive, journal, place = None, recovered.journal, recovered.place
        if self._archiver is not None:
            segment = None if journal is None else lambda: journal.segment
            archive = self._archiver.session(place.storage, place.folder, recovered.session.plan.name, segment)
            if (before := self._archives.get(place.folder)) is not None:
                before.stop()  # of the life before this one
            self._archives[place.folder] = archive
        return Keeper(
            recovered.session,
            recovered.place,
            recovered.level,
            self._disk,
            journal=recovered.journal,
            predecessors=recovered.predecessors,
            most_bytes=self._settings.max_journal_bytes,
            clock=self._clock,
            archive=archive,
        )

    async def remove(self, name: str) -> None:
        """Remove the files of a session, also of one that cannot be recovered; its copy in an archive stays.

        Raises:
            Recovering: it is coming back; it can be removed then.
            NotDurable: the disk failed; it can be removed again.
        """
        absent = self.absent.get(name)
        if absent is not None and absent.error is None:
            self.check(name)
        folder = absent.folder if absent is not None else self._folders.pop(name, None)
        if folder is not None:
            if (archive := self._archives.pop(folder, None)) is not None:
                archive.stop()
            try:
                await self._run(lambda: self.directory.remove(folder))
            except OSError as exc:
                error = not_durable(exc)
                self.absent[name] = Absent(folder, error=error)  # its name stays taken, and it can be removed again
                raise error from exc
            self.absent.pop(name, None)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    def end(self) -> None:
        """Bring no further session back; those that are on their way come, and end in order."""
        self._ending = True

    def close(self) -> None:
        """Give the directory up."""
        self._disk.shutdown(wait=True)
        if self._archiver is not None:
            self._archiver.close()
        self.directory.close()
