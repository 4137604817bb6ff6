"""The history of a session, as far as its snapshots and its journal still have it; nothing here changes anything.

    log           who made each version, when, and what its step said
    session_at    the session as it was at a version: the newest snapshot before it, and what happened from there on

A journal that goes on being written is read up to the number that it had when its owner asked. The owner holds the
segments there meanwhile (`Keeper.standing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, final

from farstep.errors import DamagedJournal, InvalidOption
from farstep.protocol.policies import GRAD_NORM
from farstep_service.coordinator import Append, Event, Push, Put, Result, StepTaken, Written
from farstep_service.durability.reading import JournalReader
from farstep_service.durability.recorder import Happened, read_events, read_waiting
from farstep_service.durability.snapshots import Manifest
from farstep_service.durability.storage import Storage
from farstep_service.keeping.recovery import again, begun, let_wait
from farstep_service.kernels import Kernels
from farstep_service.session import Session

Kind = Literal["step", "contents", "group"]
WITH_A_JOURNAL: Final = "Create it with durability=farstep.Journal(), on a server with a --data-dir."


@final
@dataclass(frozen=True, slots=True)
class Line:
    """One version of a session.

    Attributes:
        version: its number.
        at: the time of day, in seconds since 1970.
        write: what made it: a step, contents that were written, or a param group that was added.
        workers: whose gradients made the step, in the order of their sum; or who wrote.
        staleness: steps between the oldest of the versions that these gradients were computed on and the step.
        norm: that of the step's gradients, where a policy of the session says it.
        kernel: which one ran, "" for none.
        hash: the chain of the journal after it, as hex: it covers all that happened up to there.
    """

    version: int
    at: float
    write: Kind
    workers: tuple[str, ...]
    staleness: int
    norm: float | None
    kernel: str
    hash: str


@final
@dataclass(frozen=True, slots=True)
class History:
    """What is kept of one session.

    Attributes:
        name: the session's.
        storage, folder: where.
        snapshots: the numbers of the snapshots that are kept, ascending.
        upto: the number of the last record of the journal; None without a journal.
    """

    name: str
    storage: Storage
    folder: str
    snapshots: tuple[int, ...]
    upto: int | None

    def manifests(self) -> list[Manifest]:
        """Return the manifests of the snapshots that are kept, ascending, without those that are damaged."""
        found = []
        for number in self.snapshots:
            try:
                found.append(Manifest(self.storage, self.folder, number))
            except (DamagedJournal, OSError):
                continue
        return found

    def reader(self, manifest: Manifest) -> JournalReader:
        """Return what reads the journal behind a snapshot.

        Raises:
            InvalidOption: there is no journal.
            DamagedJournal: see `JournalReader`.
        """
        position = manifest.position
        if position is None:
            raise self.no_journal()
        first = manifest.first_segment or 0
        return JournalReader(self.storage, self.folder, position.number, position.chain, first)

    def lines(self) -> Iterator[Line]:
        """Go through the versions, in their order.

        Raises:
            InvalidOption: there is no journal.
            DamagedJournal: it does not hold.
        """
        for manifest in self.manifests()[:1]:
            reader, bases = self.reader(manifest), dict(_waiting_in(manifest))
            for each in read_events(reader, upto=self.upto, check=False):
                if isinstance(each.event, Push):
                    bases[each.event.head.name.worker] = each.event.head.base
                yield from _lines_of(each, bases)

    def kept(self) -> str:
        """Return in words which versions can be gone back to."""
        manifests = self.manifests()
        made = [each.said["version"] for each in manifests if each.has_contents]
        if manifests and manifests[0].position is not None:
            made += [line.version for line in self.lines()]
            return f"versions {min(made)} to {max(made)}" if made else "no version"
        return f"versions {', '.join(map(str, dict.fromkeys(made)))}" if made else "no version"

    def session_at(self, version: int, kernels: Callable[[str], Kernels], device: str) -> Session:
        """Return the session as it was when a version was made, in memory of its own.

        Raises:
            InvalidOption: that version is not kept; the error names those that are.
            DamagedJournal: what led to it cannot be read.
        """
        session, reader = self.before(version, kernels, device)
        if reader is not None:
            for each in read_events(reader, upto=self.upto):
                if is_past(session, version):
                    break
                again(session, each, reader, lambda now: session.initialised and now >= version)
        if not is_past(session, version) or session.version != version:
            raise self.not_kept(version)
        return session

    def before(
        self, version: int, kernels: Callable[[str], Kernels], device: str
    ) -> tuple[Session, JournalReader | None]:
        """Return the session as it was at the newest snapshot up to a version, and what reads what happened then.

        Raises:
            InvalidOption: no snapshot is so old.
            DamagedJournal: there is none that holds.
        """
        damage: DamagedJournal | None = None
        for manifest in reversed(self.manifests()):
            if not _begins(manifest, version):
                continue
            try:
                saved = manifest.read()
            except DamagedJournal as exc:
                damage = damage or exc
                continue
            session = begun(saved, kernels, device)
            if manifest.position is None:
                return session, None
            reader = self.reader(manifest)
            let_wait(session, saved, reader)
            return session, reader
        raise damage or self.not_kept(version)

    def reaches(self, version: int) -> bool:
        """Return whether there is a snapshot from which a version can be come to."""
        return any(_begins(each, version) for each in self.manifests())

    def no_journal(self) -> InvalidOption:
        """Return the error for a session without a journal."""
        return InvalidOption(
            f"Session {self.name!r} has no journal, so what happened to it is not written down.",
            remedy=WITH_A_JOURNAL,
            field="durability",
        )

    def not_kept(self, version: int) -> InvalidOption:
        """Return the error for a version that is not there."""
        return InvalidOption(
            f"Version {version} of session {self.name!r} is not kept; {self.kept()} can be had.",
            remedy="Name one of these: a journal reaches back to the older of the two snapshots that are kept.",
            field="version",
        )


def is_past(session: Session, version: int) -> bool:
    """Return whether a session is at a version, or beyond it."""
    return session.initialised and session.version >= version


def _begins(manifest: Manifest, version: int) -> bool:
    return manifest.said["version"] <= version or not manifest.has_contents


def _waiting_in(manifest: Manifest) -> Iterator[tuple[str, int]]:
    """Yield the pushes that waited when a snapshot was made: their worker, and what they were computed on."""
    for push, _ in read_waiting(manifest.said["waiting"]):
        yield push.name.worker, push.base


def _lines_of(happened: Happened, bases: dict[str, int]) -> Iterator[Line]:
    """Return the versions that an event made.

    Args:
        bases: by worker, the version that its last gradients were computed on.
    """
    event = happened.event
    results: list[tuple[Event | Result, bytes]] = [(event, happened.chain)]
    results += zip(happened.results, happened.chains, strict=True)
    for result, chain in results:
        if isinstance(result, StepTaken):
            workers = result.contributors
            stale = max((result.version - 1 - bases[each] for each in workers if each in bases), default=0)
            norm = dict(result.facts).get(GRAD_NORM)
            yield Line(result.version, happened.at, "step", workers, max(stale, 0), norm, result.kernel, chain.hex())
        elif isinstance(result, Written) and result.applied and isinstance(event, Put | Append):
            kind: Kind = "contents" if isinstance(event, Put) else "group"
            yield Line(result.version, happened.at, kind, (event.head.name.worker,), 0, None, "", chain.hex())
