"""An event whose result was not written down any more: what comes of it at the recovery is written down then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import farstep
from farstep.protocol.messages import PushHead
from farstep_service.coordinator import Event, Result, StepTaken
from farstep_service.durability.reading import JournalReader
from farstep_service.durability.recorder import Happened, Recorder, read_events
from farstep_service.durability.segments import NO_CHAIN
from farstep_service.durability.snapshots import Position, Saved, write_snapshot
from farstep_service.durability.storage import DiskStorage
from farstep_service.keeping.journal_size import begin_journal
from farstep_service.keeping.recovery import Progress, recover
from farstep_service.kernels import Kernels
from farstep_service.session import Session
from farstep_service.tensors.contribution import Contribution
from tests.session.writers import begun, new_session, values

FOLDER = "sessions/x"


class Died(BaseException):
    """The process ended here."""


def kept(storage: DiskStorage, session: Session) -> Recorder:
    """Write the first snapshot of a session, and begin its journal."""
    record = session.record()
    tensors = replace(record.tensors, plan=replace(session.plan, durability=farstep.Journal()))
    journal = begin_journal(storage, FOLDER, "os", session.plan)
    saved = Saved(
        incarnation="here",
        predecessors=(),
        coordinator=record.written,
        tensors=tensors,
        position=Position(0, NO_CHAIN, journal.segment),
    )
    write_snapshot(storage, FOLDER, 1, saved)
    recorder = session.journal = Recorder(journal, session.payload)
    return recorder


def recovered(storage: DiskStorage) -> Session:
    """Bring the session back."""
    return recover(storage, FOLDER, Progress(0.0), kernels=lambda _: Kernels("reference"), device="cpu").session


def last_of(storage: DiskStorage) -> Happened:
    return [*read_events(JournalReader(storage, FOLDER, 0, NO_CHAIN, 1))][-1]


@pytest.fixture(autouse=True)
def journaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gradients of every push go to the journal, as the host of a session does."""
    whole = Session.contribution

    def contribution(session: Session, head: PushHead, *, checked: bool = False) -> Contribution:
        made = whole(session, head, checked=checked)
        made.journal_(None)
        return made

    monkeypatch.setattr(Session, "contribution", contribution)


def test_a_result_that_died_with_the_process_is_written_at_the_recovery(tmp_path: Path) -> None:
    """The step that the first recovery takes is the one that every later recovery takes again, with the same kernel."""
    storage, session = DiskStorage(tmp_path), new_session()
    recorder = kept(storage, session)
    (writer,) = begun(session)

    def dying(happened: Event | Result, now: float) -> None:
        if isinstance(happened, StepTaken):
            raise Died
        recorder(happened, now)

    session.journal = dying
    with pytest.raises(Died):
        writer.push(values(session, 1))
    assert last_of(storage).results == []

    first = recovered(storage)
    (result,) = last_of(storage).results
    assert isinstance(result, StepTaken)
    assert result.version == first.version == 1

    second = recovered(storage)
    assert last_of(storage).results == [result], "it happened for the first time once more"
    for ours, theirs in zip(first.snapshot()[0].contents.memory(), second.snapshot()[0].contents.memory(), strict=True):
        assert bytes(ours) == bytes(theirs)
    writer.session = second
    (answer,) = writer.push(values(session, 1), base=0).values()
    assert answer.duplicate, "the push that was cut off is in the ledger"
