"""The sessions of one server, within budgets that protect each from the rest.

    find      the actor of a session, by its name
    place     the same, created if missing
    remove    end a session

Through these methods the routes find a session's actor, wherever it lives; at present all of them are in this process.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Final, cast

from farstep.errors import Busy, LimitExceeded, OptionsDiffer, SessionExists, UnknownSession
from farstep.protocol.durability import NONE
from farstep_service.keeping.recovery import Recovered
from farstep_service.kernels import Kernels
from farstep_service.machine import resident_bytes, usable_bytes
from farstep_service.plan import KernelMode, Plan
from farstep_service.session import Session, SessionRecord
from farstep_service.sessions import Actor, nbytes_beside
from farstep_service.sessions.histories import Histories
from farstep_service.sessions.keeper import Keeper
from farstep_service.sessions.memory_budget import UNBOUNDED, InFlight, MemoryBudget, SessionMemory
from farstep_service.sessions.vault import Vault
from farstep_service.settings import Settings
from farstep_service.tensors import Snapshot

INLINE_PARTS: Final = 1000
"""The parameters and param groups up to which two plans are compared on the event loop."""
DEFAULT_SHARE: Final = 0.9
"""The share of the free memory at the start of a server that sessions and requests may take."""


def default_bytes(device: str) -> int:
    """Return the default limit of sessions and requests: most of the free memory that this process may use."""
    usable = usable_bytes(device)
    if usable is None:
        return UNBOUNDED
    return int(DEFAULT_SHARE * max(0, usable - (resident_bytes() if device == "cpu" else 0)))


class Registry:
    """The sessions of one server, by name.

    Args:
        settings: limits and device.
        executor: runs large work of all sessions.
        clock: monotonic seconds, for their leases and deadlines.

    Attributes:
        budget: the memory that they and requests to them take.
        histories: what is kept of their histories.
    """

    def __init__(self, settings: Settings, executor: Executor, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._executor = executor
        self._clock = clock
        self._actors: dict[str, Actor] = {}
        self._names: list[str] = []  # of all, ascending
        self.budget = MemoryBudget(settings.max_bytes or default_bytes(settings.device))
        self._turn = asyncio.Lock()
        self._leaving: dict[str, asyncio.Event] = {}  # by their names, until their files are gone
        self._kernels: dict[str, Kernels] = {}
        self._vault = Vault(settings, clock) if settings.data_dir else None
        disk = executor if self._vault is None else self._vault.executor
        self.histories = Histories(disk, self._kernels_of, settings.device, clock)
        self._recovery: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._actors)

    @property
    def actors(self) -> list[Actor]:
        """Return every session's actor, in the order of their creation."""
        return list(self._actors.values())

    def actors_after(self, name: str, most: int) -> list[Actor]:
        """Return the first `most` sessions after a name, in the order of names."""
        first = bisect_right(self._names, name)
        return [self._actors[each] for each in self._names[first : first + most]]

    @property
    def parameter_bytes(self) -> int:
        """Return the bytes of the parameters of all sessions."""
        return sum(actor.parameter_bytes for actor in self._actors.values())

    def find(self, name: str) -> Actor:
        """Return the actor of a session.

        Raises:
            UnknownSession: there is none of that name.
        """
        actor = self._actors.get(name)
        if actor is None:
            self._check_present(name)
            raise UnknownSession(
                f"There is no session {name!r:.80} here.",
                remedy="Join it first; a server that restarted has forgotten the sessions that it did not keep.",
            )
        return actor

    def _check_present(self, name: str) -> None:
        """Refuse what is asked of a session that is on the disk, and not back.

        Raises:
            Recovering, DamagedJournal: it is coming back, or cannot.
        """
        if self._vault is not None:
            self._vault.check(name)

    async def begin(self) -> None:
        """Find the sessions that were kept, and begin to bring them back."""
        vault = self._vault
        if vault is not None:
            await asyncio.to_thread(vault.look)
            self._recovery = asyncio.get_running_loop().create_task(vault.recover(self._kernels_of, self._back))

    def _back(self, session: Session, keeper: Keeper, now: float) -> None:
        """Add a session that was recovered; its clock goes on where it stopped."""
        ahead_s = now - self._clock()
        self._add(session, keeper, lambda: self._clock() + ahead_s)

    async def end(self) -> None:
        """End all sessions in order: what is to be kept is kept."""
        if self._recovery is not None:
            assert self._vault is not None
            self._vault.end()
            await asyncio.gather(self._recovery, return_exceptions=True)
        await asyncio.gather(*(actor.end() for actor in self.actors))
        if self._vault is not None:
            await asyncio.to_thread(self._vault.close)

    async def place(self, plan: Plan, *, options: bool = True) -> tuple[Actor, bool]:
        """Return the session of the plan's name, created if it does not exist, and whether it was created.

        Args:
            plan: the plan of the joining worker.
            options: its options must equal those at the session's creation, or those in force.

        Raises:
            OptionsDiffer: the session exists with another plan; the error names the difference.
            LimitExceeded, Busy: the session is too large, or the server has no room for it.
        """
        while (leaving := self._leaving.get(plan.name)) is not None:
            await leaving.wait()
        async with self._turn:
            actor = self._actors.get(plan.name)
            if actor is not None:
                compare = partial(actor.plan.difference, plan, options=options, in_force=actor.options)
                quick = len(plan.layout.segments) + len(plan.groups) <= INLINE_PARTS
                if difference := (compare() if quick else await asyncio.to_thread(compare)):
                    raise OptionsDiffer(
                        f"Session {plan.name!r} exists, but {difference}.",
                        remedy="Join with equal options (or options='session', which takes those of groups that are in "
                        "force), choose another session name, or remove the session.",
                        field="name",
                    )
                return actor, False
            self._check_present(plan.name)
            self._check_room(plan)
            return await self._kept(self._new_session(plan)), True

    def check_free(self, plan: Plan) -> None:
        """Refuse a session that cannot be added.

        Raises:
            SessionExists: its name is taken.
            LimitExceeded, Busy: it is too large, or the server has no room for it.
        """
        self._check_present(plan.name)
        if plan.name in self._actors or plan.name in self._leaving:
            raise SessionExists(
                f"There is a session {plan.name!r} here.",
                remedy="Give the new one another name, or remove the one that is here.",
                field="name",
            )
        self._check_room(plan)

    async def restore(self, snapshot: Snapshot) -> Actor:
        """Add a session from a snapshot; it can be joined when it is complete, and not before.

        Raises:
            SessionExists, LimitExceeded, Busy: see `check_free`.
            TensorMismatch: the state is invalid.
        """
        plan = snapshot.plan
        self.check_free(plan)
        session = self._new_session(plan)
        # Not inline: it may wait for a kernel to be built.
        await asyncio.get_running_loop().run_in_executor(self._executor, session.restore, snapshot)
        async with self._turn:
            self.check_free(plan)  # another one may have been added meanwhile
            return await self._kept(session)

    async def fork(self, name: str, new: str, version: int | None) -> Actor:
        """Add a session that begins with what another one is, or was at a version, and has a future of its own.

        Raises:
            UnknownSession, SessionExists, LimitExceeded, Busy: see `find` and `check_free`.
            InvalidOption: that version is not kept.
        """
        actor = self.find(name)
        plan = replace(actor.plan, name=new)
        self.check_free(plan)
        if version is None:
            record = await actor.reads.record()
            session = await asyncio.get_running_loop().run_in_executor(self._executor, self._session_of, record)
        else:
            session = await self.histories.at(actor, version)
        session.begin_anew(secrets.token_hex(16), (), name=new)
        async with self._turn:
            self.check_free(plan)
            return await self._kept(session)

    def _session_of(self, record: SessionRecord) -> Session:
        plan = record.tensors.plan
        return Session(
            plan,
            incarnation=secrets.token_hex(16),
            kernels=self._kernels_of(plan.kernel),
            device=self._settings.device,
            record=record,
        )

    async def roll_back(self, name: str, version: int) -> Actor:
        """Let a session go on at an earlier version, as another life of it.

        Raises:
            UnknownSession: there is none of that name.
            InvalidOption: that version is not kept.
            NotDurable: the disk failed; nothing has changed.
        """
        actor = self.find(name)
        self.budget.check(actor.plan.layout.nbytes)

        def switch(session: Session, recovered: Recovered) -> Actor:
            assert self._vault is not None
            self._forget(name)
            return self._add(session, self._vault.keeper_of(recovered), self._clock)

        return await self.histories.go_back(actor, version, switch, self._turn)

    async def _kept(self, session: Session) -> Actor:
        """Add a new session, kept as its plan says.

        Raises:
            NotDurable: the disk has no room for it.
        """
        keeper = None
        if self._vault is not None and session.plan.durability != NONE:
            keeper = await self._vault.create(session)
        return self._add(session, keeper, self._clock)

    def _add(self, session: Session, keeper: Keeper | None, clock: Callable[[], float]) -> Actor:
        share = SessionMemory(self.budget, self._check_growth)
        share.note(session.held_bytes)
        actor = Actor(session, self._executor, clock, share=share, versions=self._settings.held_versions, keeper=keeper)
        self._actors[actor.name] = actor
        insort(self._names, actor.name)
        return actor

    def _new_session(self, plan: Plan) -> Session:
        kernels = self._kernels_of(plan.kernel)
        if plan.durability is None:
            plan = replace(plan, durability=self._settings.default_durability)
        return Session(plan, incarnation=secrets.token_hex(16), kernels=kernels, device=self._settings.device)

    def _kernels_of(self, mode: str) -> Kernels:
        kernels = self._kernels.get(mode)
        if kernels is None:
            kernels = self._kernels[mode] = Kernels(cast(KernelMode, mode))
        return kernels

    def _check_room(self, plan: Plan) -> None:
        """Refuse a session that is too large, or for which memory is short."""
        self._check_size(plan.layout.nbytes)
        limit = self._settings.max_sessions
        if len(self._actors) >= limit:
            raise Busy(f"The server has {len(self._actors)} sessions.", remedy="Remove one that is done.", limit=limit)
        self.budget.check(plan.layout.nbytes)  # nothing is allocated, or counted, before the contents arrive

    def _check_growth(self, plan: Plan, nbytes: int) -> None:
        """Refuse to grow the session of a plan by `nbytes` if it would be too large."""
        self._check_size(plan.layout.nbytes + nbytes)

    def _check_size(self, nbytes: int) -> None:
        limit = self._settings.max_session_bytes
        if nbytes > limit:
            raise LimitExceeded(
                f"The session's parameters take {nbytes} bytes.",
                remedy="The server's --max-session-gib says how large one may be.",
                limit=limit,
            )

    def check_room_to_share(self, actor: Actor) -> None:
        """Refuse to map a worker's shared memory if memory is short.

        Raises:
            Busy: see `MemoryBudget.check`.
        """
        self.budget.check(2 * actor.plan.layout.nbytes + nbytes_beside(actor.plan))

    async def remove(self, name: str) -> None:
        """End a session.

        Raises:
            UnknownSession: there is none of that name.
        """
        async with self._turn:
            vault = self._vault
            if vault is not None and name not in self._actors and name in vault.absent:
                await vault.remove(name)
                return
            removed = [self.find(name)]
            self._forget(name)
            gone = self._leaving[name] = asyncio.Event()
        try:  # others are created and joined meanwhile: its files may be in use for a while
            await removed[0].close()
            if vault is not None:
                await vault.remove(name)
        finally:
            del self._leaving[name]
            gone.set()
        # Freed in a thread: the session may have gigabytes and 100,000 objects.
        await asyncio.to_thread(removed.clear)

    def _forget(self, name: str) -> None:
        del self._actors[name]
        del self._names[bisect_left(self._names, name)]

    def in_flight(self) -> InFlight:
        """Account for the memory of one request until it is answered; see `MemoryBudget.in_flight`."""
        return self.budget.in_flight()
