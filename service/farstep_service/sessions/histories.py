"""What a server's operator asks of a session's history: look at it, go back in it, fork from it.

    log          the versions, and what made each
    replayed     the same in full: it happens again in a session of its own
    at           the session as it was at a version, to fork from
    go_back      the same, in the place of what the session is

All of it is done in a thread, while the session goes on: it only reads what is kept, which stays there meanwhile.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from itertools import islice
from typing import TypeVar, final

from farstep.errors import InvalidOption
from farstep_service.coordinator import rolled_back
from farstep_service.keeping.history import WITH_A_JOURNAL, History, Line
from farstep_service.keeping.place import Place
from farstep_service.keeping.recovery import Recovered, known_after, write_anew
from farstep_service.keeping.scratch import Replayed, replay
from farstep_service.kernels import Kernels
from farstep_service.session import Session
from farstep_service.sessions.actor import Actor
from farstep_service.sessions.keeper import Keeper

T = TypeVar("T")


@final
class Histories:
    """The history of the sessions of one server.

    Args:
        executor: waits for the disk, and does what takes long.
        kernels: returns the kernels of a mode.
        device: where tensors are to live.
        clock: monotonic seconds.
    """

    def __init__(
        self, executor: Executor, kernels: Callable[[str], Kernels], device: str, clock: Callable[[], float]
    ) -> None:
        self._executor = executor
        self._kernels = kernels
        self._device = device
        self._clock = clock
        self._turn = asyncio.Lock()  # one scratch session at a time

    async def log(self, actor: Actor, after: int, most: int) -> list[Line]:
        """Return the first `most` versions after one.

        Raises:
            InvalidOption: the session has no journal.
            DamagedJournal: it does not hold.
        """
        async with _history(actor) as history:
            return await self._run(lambda: [*islice((line for line in history.lines() if line.version > after), most)])

    async def replayed(self, actor: Actor, first: int, last: int) -> list[Replayed]:
        """Let the versions from `first` to `last` happen again in a session of its own.

        Raises:
            InvalidOption: they are not kept, or the session has no journal.
            DamagedJournal, Unavailable: see `again`.
        """
        async with self._turn, _history(actor) as history:
            return await self._run(lambda: replay(history, first, last, self._kernels, self._device))

    async def at(self, actor: Actor, version: int) -> Session:
        """Return the session as it was at a version; see `History.session_at`."""
        async with self._turn, _history(actor) as history:
            return await self._run(lambda: history.session_at(version, self._kernels, self._device))

    async def go_back(
        self, actor: Actor, version: int, switch: Callable[[Session, Recovered], T], turn: asyncio.Lock
    ) -> T:
        """Let the session as it was at a version take the place of what it is.

        Args:
            actor: of the session; it is over then.
            version: to go back to.
            switch: takes the session that goes on, and what is kept of it, in the same turn.
            turn: held meanwhile, so that the session is not removed.

        Raises:
            InvalidOption: that version is not kept.
            SessionLost: the session was removed meanwhile.
            NotDurable: the disk failed. Nothing has changed then.
        """
        session = await self.at(actor, version)
        async with turn, _history(actor) as history:
            keeper = kept_by(actor)
            known = known_after(keeper.predecessors, actor.incarnation)
            session.begin_anew(secrets.token_hex(16), known)
            before = keeper.place
            place = Place(before.storage, before.folder, [*before.snapshots], before.last)
            anew = Recovered(session, place, keeper.level, keeper.journal, known, self._clock())

            def work() -> None:
                try:
                    write_anew(anew)
                finally:
                    before.last = place.last  # no number is used twice

            await actor.give_way(work, lambda: rolled_back(history.name, version))
            return switch(session, anew)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


@asynccontextmanager
async def _history(actor: Actor) -> AsyncIterator[History]:
    """Hold what is kept of a session.

    Raises:
        InvalidOption: nothing is.
        NotDurable: the disk failed.
    """
    keeper = kept_by(actor)
    async with keeper.standing():
        await keeper.kept()  # what is shown is there after a loss of power, too, as the level says
        journal, place = keeper.journal, keeper.place
        yield History(
            actor.name,
            place.storage,
            place.folder,
            tuple(number for number, _ in place.snapshots),
            None if journal is None else journal.number,
        )


def kept_by(actor: Actor) -> Keeper:
    """Return what keeps a session on the disk.

    Raises:
        InvalidOption: it is in memory only.
    """
    if actor.keeper is None:
        raise InvalidOption(
            f"Session {actor.name!r} is kept in memory only, so there is no history of it.",
            remedy=WITH_A_JOURNAL,
            field="durability",
        )
    return actor.keeper
