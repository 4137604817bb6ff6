"""When what has happened to one session may be told: when it is kept as its level says."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from farstep.errors import NotDurable
from farstep.protocol.durability import Durability, Journal
from farstep_service.durability import journal as journals
from farstep_service.durability.recorder import DIRECT_BYTES, Recorder, not_durable
from farstep_service.failpoints import reached
from farstep_service.session import Session
from farstep_service.tensors.contribution import Contribution

T = TypeVar("T")


class Acknowledging(ABC):
    """Let gradients arrive in the journal of a session, and wait for the disk before it is answered.

    Args:
        session: the session.
        level: how it is kept.
        executor: waits for the disk.
        journal: what is written; None for a level without one.

    Attributes:
        level: as above.
    """

    def __init__(
        self, session: Session, level: Durability, executor: Executor, journal: journals.Journal | None
    ) -> None:
        self.level = level
        self._session, self._executor = session, executor
        self._recorder = None if journal is None else Recorder(journal, session.payload)
        session.journal = self._recorder
        self._waits = isinstance(level, Journal) and level.sync != "os"
        self._syncing: asyncio.Task[None] | None = None

    @abstractmethod
    def written(self) -> None:
        """Note that something has happened; begin a snapshot if one is due."""

    @abstractmethod
    def mend(self, recorder: Recorder) -> None:
        """Let a snapshot take the place of a journal that fills the disk, or cannot be written."""

    def journal_(self, contribution: Contribution) -> None:
        """Let gradients that are about to arrive go to the journal: large ones are received there.

        Raises:
            NotDurable: the disk has no room for them.
        """
        recorder = self._recorder
        if recorder is None:
            return
        try:
            contribution.journal_(recorder.reserve if contribution.nbytes >= DIRECT_BYTES else None)
            self.written()  # also for a push that is cut off, or refused
        except NotDurable:
            self.mend(recorder)
            raise

    async def kept(self) -> float:
        """Wait until everything up to now is kept as the level says; return the seconds that took.

        Raises:
            NotDurable: the disk failed; what was done is not acknowledged, and may be asked for again.
        """
        recorder = self._recorder
        if recorder is None:
            return 0.0
        if recorder.behind is not None:
            self.mend(recorder)
            raise not_durable(recorder.behind)
        self.written()  # every event counts, not only those of writes
        if not self._waits:
            return 0.0
        number, began = recorder.journal.number, time.perf_counter()
        if recorder.journal.durable >= number:
            return 0.0
        if isinstance(self.level, Journal) and self.level.sync == "always":
            await self._sync(number)
            return time.perf_counter() - began
        while recorder.journal.durable < number:
            if recorder.behind is not None:
                raise not_durable(recorder.behind)
            if self._syncing is None or self._syncing.done():
                self._syncing = asyncio.get_running_loop().create_task(self._sync(recorder.journal.number))
            await asyncio.shield(self._syncing)
        return time.perf_counter() - began

    async def _sync(self, number: int) -> None:
        recorder = self._recorder
        assert recorder is not None
        try:
            await self._run(lambda: recorder.journal.sync(number))
        except OSError as exc:
            recorder.fall_behind(exc)
            self.mend(recorder)
            raise not_durable(exc) from exc
        reached("session.synced")

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)
