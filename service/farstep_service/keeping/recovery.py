"""Sessions that were kept, and are there again: the newest snapshot that holds, and what happened after it.

manifest ──► snapshot ──► session ──► replay of the journal, event by event, through the calls that live ones take
                              │
                              └── the same incarnation if nothing that was acknowledged can be lost, otherwise another
                                  one that names it: a write from before is answered with `rolled_back`
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from farstep.errors import DamagedJournal, FarstepError, Unavailable
from farstep.protocol.durability import NONE, Durability, Journal
from farstep.protocol.growth import AppendHead
from farstep.protocol.messages import PushHead, PutHead
from farstep_service.coordinator import Append, Push, Put, StepTaken
from farstep_service.durability import journal as journals
from farstep_service.durability.reading import JournalReader
from farstep_service.durability.reading import Recovered as FoundOfJournal
from farstep_service.durability.recorder import (
    Happened,
    Recorder,
    is_whole,
    memory_of_payload,
    not_durable,
    place_of,
    read_events,
    read_waiting,
)
from farstep_service.durability.snapshots import (
    CONTENTS,
    KEPT,
    MANIFEST,
    STATE,
    Manifest,
    Position,
    Saved,
    damaged_file,
    forget_snapshots,
    numbers_in,
    write_snapshot,
)
from farstep_service.durability.storage import Storage
from farstep_service.keeping.journal_size import begin_journal
from farstep_service.keeping.place import Place
from farstep_service.kernels import Kernels
from farstep_service.session import Session, SessionRecord, cannot_run
from farstep_service.tensors.payload import Payload

log = logging.getLogger("farstep.durability")

MOST_PREDECESSORS: Final = 64
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
    reference: bool = False,
) -> Recovered:
    """Bring a session back.

    Args:
        storage, folder: where it was kept.
        progress: is kept up to date.
        kernels: returns the kernels of a mode.
        device: where its tensors are to live.
        reference: steps are taken again with the reference kernel, whatever ran then; another incarnation goes on with
            the bits that this gives.

    Raises:
        DamagedJournal: what it was cannot be read; nothing has changed on the disk.
        NotDurable: another incarnation goes on, and cannot be written down.
        FarstepError: a kernel that ran is not available here.
    """
    manifest, saved = _newest_that_holds(storage, folder)
    level = saved.tensors.plan.durability or NONE
    session = begun(saved, kernels, device, reference=reference)
    plan = session.plan
    numbers = numbers_in(storage, folder)
    place = Place(storage, folder, [], numbers[-1])
    position = manifest.position
    if position is None:
        return _without_journal(session, place, level, saved, manifest)
    reader = JournalReader(storage, folder, position.number, position.chain, manifest.first_segment or 0)
    happened = list(read_events(reader))
    found = reader.found
    if found.dropped is not None:
        log.warning("session %s: the torn end of %s at byte %d was dropped", plan.name, *found.dropped)
    progress.events = len(happened)
    let_wait(session, saved, reader)
    assert isinstance(level, Journal)
    following = max(found.segment, position.segment)
    journal = begin_journal(storage, folder, level.sync, plan, after=found, segment=following)
    journal.go_on(position.number, position.segment)
    session.note_time(saved.now)
    now, differs = saved.now, reference and any(map(ran_other_than_reference, happened))
    recorder = session.journal = Recorder(journal, session.payload)  # for the result that the last event did not get
    for each in happened:
        now = max(now, each.now)
        again(session, each, reader, reference=differs)
        progress.done += 1
    session.journal = None
    if recorder.behind is not None:
        raise not_durable(recorder.behind)
    place.snapshots[:] = _kept(storage, folder, numbers)
    recovered = Recovered(session, place, level, journal, saved.predecessors, now)
    lost = level.sync == "os" and may_miss(saved, position, found, happened=bool(happened))
    lost |= manifest.said.get("restored", False)  # from an archive, which may not have the last steps
    return begin_anew(recovered) if lost or differs else recovered


def may_miss(saved: Saved, position: Position, found: FoundOfJournal, *, happened: bool) -> bool:
    """Return whether a loss of power may have taken events that were not synced, without a trace.

    A session that ended in order misses nothing, unless a server went on with it: that begins a segment first.
    """
    went_on = happened or found.segment > position.segment + 1
    return found.rebooted and (went_on or not saved.clean)


def begun(saved: Saved, kernels: Callable[[str], Kernels], device: str, *, reference: bool = False) -> Session:
    """Return the session of a snapshot, without the pushes that waited.

    Args:
        saved, kernels, device: what it is, and what it runs on.
        reference: where it insists on a kernel that is not available here, it runs the reference one until it is.

    Raises:
        Unavailable: it insists on a kernel that is not available here.
    """
    plan, record = saved.tensors.plan, SessionRecord(saved.coordinator, saved.tensors)
    mode = "auto" if reference and plan.kernel == "fused" else plan.kernel
    try:
        return Session(plan, incarnation=saved.incarnation, kernels=kernels(mode), device=device, record=record)
    except Unavailable as exc:
        raise cannot_run(plan.name, f"runs on the {plan.kernel} kernel only", exc) from exc


def let_wait(session: Session, saved: Saved, reader: JournalReader) -> None:
    """Let the pushes arrive again that waited when a snapshot was made.

    Raises:
        DamagedJournal: the gradients of one are not what they were.
    """
    for head, payload in read_waiting(saved.waiting):
        if payload is not None and not is_whole(payload, reader):
            segment, offset, _ = place_of(payload)
            raise damaged_file(f"segment {segment}", f"the gradients of a push that waits, at byte {offset}")
        _arrive(session, head, payload, reader)


def ran_other_than_reference(happened: Happened) -> bool:
    """Return whether a step of an event ran another kernel than the reference one."""
    return any(
        isinstance(each, StepTaken) and each.kernel != "reference" for each in (happened.event, *happened.results)
    )


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


def _without_journal(session: Session, place: Place, level: Durability, saved: Saved, manifest: Manifest) -> Recovered:
    """Return a session that goes on at a snapshot; unless that was its end, what came after it is lost."""
    storage, used = place.storage, f"{place.folder}/{manifest.number:08}{USED}"
    place.snapshots[:] = [(number, None) for number in numbers_in(storage, place.folder)][-KEPT:]
    recovered = Recovered(session, place, level, None, saved.predecessors, saved.now)
    if not saved.clean or f"{manifest.number:08}{USED}" in storage.names(place.folder):
        return begin_anew(recovered)
    storage.write(used, [b"farstep"])
    storage.sync(used)
    storage.sync_names(place.folder)
    return recovered


def begin_anew(recovered: Recovered) -> Recovered:
    """Give a session another incarnation, of which the one before knows that it was rolled back.

    Raises:
        NotDurable: it cannot be written down.
    """
    session = recovered.session
    known = known_after(recovered.predecessors, session.incarnation)
    session.begin_anew(secrets.token_hex(16), known, name=session.plan.name)  # an archived one may have another name
    log.warning("session %s: rolled back to version %d", session.plan.name, session.version)
    anew = replace(recovered, predecessors=known)
    try:
        write_anew(anew)
    except OSError as exc:
        raise not_durable(exc) from exc
    return anew


def known_after(predecessors: tuple[str, ...], incarnation: str) -> tuple[str, ...]:
    """Return the incarnations that the next life of a session knows as those before it."""
    return (*predecessors, incarnation)[-MOST_PREDECESSORS:]


def write_anew(recovered: Recovered, *, forget: bool = True) -> None:
    """Let a snapshot of what a session is now, and a fresh journal, take the place of all that was kept of it.

    What was there before counts until the snapshot is complete, and never again from then on: no chain leads from the
    events before to those that follow.

    Args:
        recovered: the session, and where it is kept.
        forget: remove what was there before.

    Raises:
        OSError: the disk has no room for it, or failed; then nothing has changed, unless the disk does not even let go
            of what was not finished.
    """
    session, place, journal = recovered.session, recovered.place, recovered.journal
    storage, folder, position, chain = place.storage, place.folder, None, b""
    place.last += 1
    try:
        if journal is not None:
            chain = journal.chain
            fresh = secrets.token_bytes(len(chain))
            position = Position(journal.number, fresh, journal.rotate(fresh))
        record = session.record(pushes=False)
        write_snapshot(
            storage,
            folder,
            place.last,
            Saved(
                incarnation=session.incarnation,
                predecessors=recovered.predecessors,
                coordinator=record.written,
                tensors=record.tensors,
                now=recovered.now,
                position=position,
            ),
        )
    except OSError:
        for suffix in (MANIFEST, STATE, CONTENTS):
            storage.remove(f"{folder}/{place.last:08}{suffix}")
        storage.sync_names(folder)
        if journal is not None:
            journal.rotate(chain)
        raise
    place.snapshots[:] = [(place.last, None if position is None else position.segment)]
    if not forget:
        return
    forget_snapshots(storage, folder, place.last)
    if journal is not None and position is not None:
        journal.forget(position.segment)


def again(
    session: Session,
    happened: Happened,
    reader: JournalReader,
    until: Callable[[int], bool] | None = None,
    *,
    reference: bool = False,
) -> None:
    """Let an event happen again, with what came with it; see `Session.replay`."""
    arrive(session, happened, reader)
    session.replay(happened.event, happened.now, happened.results, until, reference=reference)


def arrive(session: Session, happened: Happened, reader: JournalReader) -> None:
    """Let arrive what came with an event, before it happens again.

    Raises:
        DamagedJournal: it does not fit to the session.
    """
    event = happened.event
    if isinstance(event, Push | Put) or (isinstance(event, Append) and not event.there):
        _arrive(session, event.head, happened.payload, reader)


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
