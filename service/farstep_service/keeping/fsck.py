"""Look at the files of sessions that no server owns: what is whole, what is damaged, and what can be saved.

    newest snapshot that holds ──► the journal behind it, up to the first event that does not hold
                                        │
                                   save: replay up to there ──► a new snapshot and a fresh journal
                                                                everything before goes to damaged-<n>/

Nothing is deleted. A session of which acknowledged steps are lost goes on as another incarnation, and its workers are
told that the state was rolled back.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Final, final

from farstep.errors import DamagedJournal, FarstepError
from farstep.protocol.durability import Durability, Journal, from_document, to_text
from farstep_service.coordinator import StepTaken, Written
from farstep_service.durability.reading import JournalReader, Recovered
from farstep_service.durability.recorder import Happened, read_events
from farstep_service.durability.snapshots import CONTENTS, MANIFEST, STATE, Manifest, Saved, numbers_in
from farstep_service.durability.storage import Storage
from farstep_service.keeping.journal_size import begin_journal
from farstep_service.keeping.place import Place
from farstep_service.keeping.recovery import Recovered as Session
from farstep_service.keeping.recovery import (
    again,
    begun,
    known_after,
    let_wait,
    may_miss,
    ran_other_than_reference,
    write_anew,
)
from farstep_service.kernels import Kernels

DAMAGED: Final = "damaged-"


@final
@dataclass(frozen=True, slots=True)
class Damage:
    """One file that is not what was written.

    Attributes:
        file: its name in the data directory.
        byte: where the damage is; None where only the whole is known to be wrong.
        what: the same as a sentence.
    """

    file: str
    byte: int | None
    what: str


@final
@dataclass(slots=True)
class Report:
    """What was found of one session.

    Attributes:
        folder: where it is.
        name, level: of the session; "" if no manifest can be read.
        version: up to which it can be saved; None for not at all.
        damage: what does not hold.
        lost: whether something that was acknowledged may be lost.
        saved: the folder that everything before was moved to; "" if nothing was saved.
    """

    folder: str
    name: str = ""
    level: str = ""
    version: int | None = None
    damage: list[Damage] = field(default_factory=list)
    lost: bool = False
    saved: str = ""

    @property
    def whole(self) -> bool:
        """Return whether there is no damage."""
        return not self.damage


@final
class Examination:
    """The files of one session.

    Args:
        storage, folder: where they are.

    Attributes:
        report: what was found.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._folder = storage, folder
        self.report = Report(folder)
        self._base: tuple[Manifest, Saved] | None = None
        self._before: int | None = None  # the first segment that is no segment
        self._happened: list[Happened] = []
        self._found: Recovered | None = None
        self._look()

    def _look(self) -> None:
        report = self.report
        for number in reversed(numbers_in(self._storage, self._folder)):
            try:
                manifest = Manifest(self._storage, self._folder, number)
                report.name = report.name or manifest.said["name"]
                saved = manifest.read()
            except (FarstepError, OSError) as exc:
                report.damage.append(_damage(exc, f"{self._folder}/{number:08}"))
                continue
            self._base = self._base or (manifest, saved)
        if self._base is None:
            report.damage = report.damage or [Damage(self._folder, None, "It has no snapshot.")]
            report.lost = True
            return
        manifest, saved = self._base
        level = from_document(manifest.said["durability"])
        report.level, report.version = to_text(level), saved.version
        report.lost = bool(report.damage) and saved.position is None
        if saved.position is None:
            return
        try:
            self._happened = list(self._read(manifest, saved))
        except (FarstepError, OSError) as exc:
            self._note(exc)
        made = [_version_of(each) for each in self._happened]
        report.version = max([saved.version, *(each for each in made if each is not None)])
        report.lost |= self._may_miss(level, saved)

    def _may_miss(self, level: Durability, saved: Saved) -> bool:
        """Return whether a loss of power may have taken events without a trace."""
        if not isinstance(level, Journal) or level.sync != "os" or self._found is None or saved.position is None:
            return False
        return may_miss(saved, saved.position, self._found, happened=bool(self._happened))

    def _read(self, manifest: Manifest, saved: Saved) -> Iterator[Happened]:
        """Go through the events behind a snapshot that hold."""
        reader = self._reader(manifest)
        if saved.waiting:
            let_wait(begun(saved, lambda _: Kernels("reference"), "cpu"), saved, reader)
        events = read_events(reader)
        while True:
            try:
                happened = next(events)
            except StopIteration:
                break
            except DamagedJournal as exc:
                self._note(exc)
                break
            yield happened
        self._found = reader.found

    def _note(self, exc: Exception) -> None:
        """Note damage behind the snapshot: what comes after it is lost."""
        self.report.damage.append(_damage(exc, self._folder))
        self.report.lost = True

    def _reader(self, manifest: Manifest) -> JournalReader:
        """Return what reads the journal, up to the first segment that is none."""
        position = manifest.position
        assert position is not None
        while True:
            try:
                first = manifest.first_segment or 0
                return JournalReader(self._storage, self._folder, position.number, position.chain, first, self._before)
            except DamagedJournal as exc:
                self._note(exc)
                self._before = int(PurePosixPath(exc.field or "").stem)

    def save(self, kernels: Callable[[str], Kernels], device: str, *, reference: bool = False) -> None:
        """Let a new snapshot take the place of everything, at the last state that holds.

        Raises:
            DamagedJournal: nothing can be saved.
            Unavailable: a kernel that ran cannot run here.
            OSError: the disk has no room for it; nothing has changed.
        """
        report, storage, folder = self.report, self._storage, self._folder
        if self._base is None:
            raise DamagedJournal(f"Nothing of {folder} can be saved: it has no snapshot that holds.", field=folder)
        manifest, saved = self._base
        session = begun(saved, kernels, device, reference=reference)
        position, now = manifest.position, saved.now
        level = session.plan.durability
        assert level is not None
        journal, lost = None, report.lost
        if position is not None:
            assert isinstance(level, Journal)
            reader = self._reader(manifest)
            if self._happened:
                let_wait(session, saved, reader)
            reference = reference and any(map(ran_other_than_reference, self._happened))
            for each in self._happened:
                again(session, each, reader, reference=reference)
                now = each.now
            lost |= reference
            number = position.number + sum(1 + len(each.results) for each in self._happened)
            found = Recovered(number, bytes(16), segment=reader.found.segment)
            following = max(found.segment, position.segment)
            journal = begin_journal(storage, folder, level.sync, session.plan, after=found, segment=following)
        place = Place(storage, folder, [], _last(storage, folder))
        anew = Session(session, place, level, journal, saved.predecessors, now)
        if lost:
            known = known_after(saved.predecessors, session.incarnation)
            session.begin_anew(secrets.token_hex(16), known)
            anew = replace(anew, predecessors=known)
        else:
            session.interrupt(now)  # pushes that wait were not acknowledged, and are sent again
        write_anew(anew, forget=False)
        report.version, report.saved = session.version, self._put_away(place.last, journal and journal.segment)

    def _put_away(self, snapshot: int, segment: int | None) -> str:
        """Move everything but what was just written to a folder of its own, and return its name."""
        storage, folder = self._storage, self._folder
        names = storage.names(folder)
        there = [int(each.removeprefix(DAMAGED)) for each in names if each.startswith(DAMAGED)]
        into = f"{DAMAGED}{max(there, default=0) + 1}"
        new = {f"{snapshot:08}{suffix}" for suffix in (MANIFEST, CONTENTS, STATE)}
        new |= set() if segment is None else {f"{segment:08}.journal"}
        for each in names:
            if each not in new and not each.startswith(DAMAGED):
                storage.rename(f"{folder}/{each}", f"{folder}/{into}/{each}")
        storage.sync_names(folder)
        return f"{folder}/{into}"


def _damage(exc: Exception, file: str) -> Damage:
    if not isinstance(exc, FarstepError):
        return Damage(file, None, str(exc))
    extra: dict[str, Any] = exc.extra
    byte = extra.get("byte")
    return Damage(exc.field or file, byte if isinstance(byte, int) else None, exc.detail)


def _version_of(happened: Happened) -> int | None:
    """Return the last version that an event made."""
    results = (happened.event, *happened.results)
    return next((each.version for each in reversed(results) if isinstance(each, StepTaken | Written)), None)


def _last(storage: Storage, folder: str) -> int:
    """Return the highest number that a file of a snapshot has."""
    stems = [each.partition(".") for each in storage.names(folder)]
    return max((int(stem) for stem, _, _ in stems if stem.isdecimal()), default=0)
