"""Sessions that were kept, and are there again: the newest snapshot that holds, and what happened after it.

manifest ──► snapshot ──► session ──► replay of the journal, event by event, through the calls that live ones take
                              │
                              └── the same incarnation if nothing that was acknowledged can be lost, otherwise another
                                  one that names it: a write from before is told that the state was rolled back
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from farstep.errors import DamagedJournal, FarstepError
from farstep.protocol.durability import NONE, Durability, Journal
from farstep.protocol.growth import AppendHead
from farstep.protocol.messages import PushHead, PutHead
from farstep_service.coordinator import Append, Push, Put
from farstep_service.coordinator.written import read_back
from farstep_service.durability import journal as journals
from farstep_service.durability.reading import JournalReader
from farstep_service.durability.recorder import Happened, is_whole, memory_of_payload, read_events
from farstep_service.durability.snapshots import KEPT, Manifest, Saved, damaged_file, numbers_in
from farstep_service.durability.storage import Storage
from farstep_service.kernels import Kernels
from farstep_service.session import Session, SessionRecord
from farstep_service.sessions.journal_size import begin_journal
from farstep_service.sessions.keeper import Place
from farstep_service.tensors.payload import Payload

log = logging.getLogger("farstep.durability")

USED: Final = ".used"
"""The end of the name of what says that a session went on after its last snapshot in order."""


@dataclass(slots=True)
class Recovered:
    """A session that is there again.

    Attributes:
        session: the session.
        place: where it is kept.
        level: how.
        journal: what is written from now on; None for a level without one.
        predecessors: incarnations of it of which acknowledged steps were, or may be, lost.
        now: the time of its clock.
    """

    session: Session
    place: Place
    level: Durability
    journal: journals.Journal | None
    predecessors: tuple[str, ...]
    now: float


@dataclass(slots=True)
class Progress:
    """How far a recovery is.

    Attributes:
        done, events: events that have happened again, of how many; 0 while they are not counted.
    """

    began: float
    done: int = 0
    events: int = 0

    def left_s(self) -> float:
        """Return how many seconds it may take from now on."""
        took = time.monotonic() - self.began
        if not self.done:
            return max(1.0, took)
        return max(0.1, took * (self.events - self.done) / self.done)


def newest(storage: Storage, folder: str) -> Manifest:
    """Return the manifest of the newest snapshot that has one.

    Raises:
        DamagedJournal: none can be read.
    """
    last: DamagedJournal | None = None
    for number in reversed(numbers_in(storage, folder)):
        try:
            return Manifest(storage, folder, number)
        except DamagedJournal as exc:
            last = exc
            log.error("%s", exc)
    raise last or DamagedJournal(
        f"{folder} has no snapshot.", remedy="`farstep sessions fsck` says what can be saved.", field=folder
    )


def recover(
    storage: Storage,
    folder: str,
    progress: Progress,
    *,
    kernels: Callable[[str], Kernels],
    device: str,
) -> Recovered:
    """Bring a session back.

    Args:
        storage, folder: where it was kept.
        progress: is kept up to date.
        kernels: returns the kernels of a mode.
        device: where its tensors are to live.

    Raises:
        DamagedJournal: what it was cannot be read; nothing has changed on the disk.
        FarstepError: a kernel that ran is not available here.
    """
    manifest, saved = _newest_that_holds(storage, folder)
    plan = saved.tensors.plan
    level = plan.durability or NONE
    record = SessionRecord(saved.coordinator, saved.tensors)
    session = Session(plan, incarnation=saved.incarnation, kernels=kernels(plan.kernel), device=device, record=record)
    numbers = numbers_in(storage, folder)
    place = Place(storage, folder, [], numbers[-1])
    position = manifest.position
    if position is None:
        return _without_journal(storage, session, place, level, saved, manifest)
    reader = JournalReader(storage, folder, position.number, position.chain, manifest.first_segment or 0)
    happened = list(read_events(reader))
    found = reader.found
    if found.dropped is not None:
        log.warning("session %s: the torn end of %s at byte %d was dropped", plan.name, *found.dropped)
    progress.events = len(happened)
    for head, at, packed, digest in saved.waiting:
        payload = Payload((), bytes.fromhex(digest), tuple(at), packed)
        if not is_whole(payload, reader):
            raise damaged_file(f"{folder}, segment {at[0]}", f"the gradients of a push that waits, at byte {at[1]}")
        _arrive(session, read_back(bytes.fromhex(head)), payload, reader)
    assert isinstance(level, Journal)
    following = max(found.segment, position.segment)
    journal = begin_journal(storage, folder, level.sync, plan, after=found, segment=following)
    now = saved.now
    for each in happened:
        now = each.now
        _again(session, each, reader)
        progress.done += 1
    place.snapshots[:] = _kept(storage, folder, numbers)
    lost = level.sync == "os" and found.rebooted and not (saved.clean and not happened)
    predecessors = _begin_anew(session, saved.predecessors) if lost else saved.predecessors
    return Recovered(session, place, level, journal, predecessors, now)


def _newest_that_holds(storage: Storage, folder: str) -> tuple[Manifest, Saved]:
    """Return the newest snapshot whose files hold.

    Raises:
        DamagedJournal: none does.
    """
    error: DamagedJournal | None = None
    for number in reversed(numbers_in(storage, folder)):
        try:
            manifest = Manifest(storage, folder, number)
            return manifest, replace(manifest.read(), clean=manifest.said["clean"] and error is None)
        except DamagedJournal as exc:
            log.error("%s", exc)
            error = error or exc
    raise error or DamagedJournal(f"{folder} has no snapshot.", field=folder)


def _without_journal(
    storage: Storage, session: Session, place: Place, level: Durability, saved: Saved, manifest: Manifest
) -> Recovered:
    """Return a session that goes on at a snapshot; unless that was its end, what came after it is lost."""
    used = f"{place.folder}/{manifest.number:08}{USED}"
    clean = saved.clean and f"{manifest.number:08}{USED}" not in storage.names(place.folder)
    predecessors = saved.predecessors if clean else _begin_anew(session, saved.predecessors)
    if clean:
        storage.write(used, [b"farstep"])
        storage.sync(used)
        storage.sync_names(place.folder)
    place.snapshots[:] = [(number, None) for number in numbers_in(storage, place.folder)][-KEPT:]
    return Recovered(session, place, level, None, predecessors, saved.now)


def _begin_anew(session: Session, predecessors: tuple[str, ...]) -> tuple[str, ...]:
    """Give a session another incarnation, of which the one before knows that it was rolled back."""
    known = (*predecessors, session.incarnation)[-64:]
    session.begin_anew(secrets.token_hex(16), known)
    log.warning("session %s: rolled back to version %d", session.plan.name, session.version)
    return known


def _again(session: Session, happened: Happened, reader: JournalReader) -> None:
    """Let an event happen again, with what came with it."""
    event = happened.event
    if isinstance(event, Push | Put) or (isinstance(event, Append) and not event.there):
        _arrive(session, event.head, happened.payload, reader)
    session.replay(event, happened.now, happened.results)


def _arrive(
    session: Session,
    head: PushHead | PutHead | AppendHead,
    payload: Payload | None,
    reader: JournalReader,
) -> None:
    try:
        session.arrive(head, payload, memory_of_payload(payload, reader))
    except FarstepError as exc:
        raise DamagedJournal(
            f"The journal of session {session.plan.name!r} cannot be read: {exc.detail}",
            remedy="`farstep sessions fsck` says what can be saved.",
            field=session.plan.name,
        ) from exc


def _kept(storage: Storage, folder: str, numbers: list[int]) -> Iterator[tuple[int, int | None]]:
    for number in numbers[-KEPT:]:
        try:
            yield number, Manifest(storage, folder, number).first_segment
        except DamagedJournal:
            continue
