"""What a session writes into its journal: each event with what came with it, and each result.

    [EVENT, now, at, event, [segment, offset, nbytes, packed, digest] or None]       before it happens
    [RESULT, now, result]                                                            when it is there

in msgpack; events and results are written as `coordinator.written` does. `now` is the session's clock, which replay
goes by; `at` is the time of day, for people who read its history. An event that cannot be written down does not
happen. There is room for the result of an event before it happens; where there is none after all, or where a sync
failed, the session is ahead of its journal, and nothing of it is acknowledged until a snapshot has caught up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import msgpack

from farstep.errors import DamagedJournal, NotDurable
from farstep.protocol.messages import PushHead, WriteName
from farstep_service.coordinator import Append, Event, Failed, NoStep, Push, Put, Result, StepTaken, Written
from farstep_service.coordinator.written import read_back, write_down
from farstep_service.durability.journal import Journal
from farstep_service.durability.reading import JournalReader
from farstep_service.durability.segments import Place
from farstep_service.durability.segments import Written as WrittenRecord
from farstep_service.durability.snapshots import Position
from farstep_service.tensors.payload import Payload, digest_of, padded

EVENT: Final = 0
RESULT: Final = 1
RESULT_BYTES: Final = 16 * 1024
"""Room that is left for the result of an event, beside what its own size says."""
DIRECT_BYTES: Final = 64 * 1024
"""Payloads from this size on are received into the journal; smaller ones are copied when they happen."""
RESULTS: Final = (StepTaken, NoStep, Written, Failed)

log = logging.getLogger("farstep.journal")


@dataclass(frozen=True, slots=True)
class Happened:
    """One event of a journal, or a result that came later than its event.

    Attributes:
        event: what happened.
        now: when, in seconds of the session's clock.
        payload: where the bytes are that came with it; None for none.
        results: what came of it.
        at: the time of day, in seconds since 1970; of a result that came later, that of the event before it.
        chain: the journal's chain after it.
        chains: the same after each of its results.
    """

    event: Event | Result
    now: float
    payload: Payload | None
    results: list[Result]
    at: float = 0.0
    chain: bytes = b""
    chains: list[bytes] = field(default_factory=list)


@final
class Recorder:
    """Write down what happens to one session.

    Args:
        journal: where to.
        payload: returns what came with a write.
        time_of_day: seconds since 1970.

    Attributes:
        journal: as above.
        behind: why the journal is not what the session is; None while it is.
        refused: the last event was not written down, as the disk had no room.
        late: called with each segment to which an event of a later one refers, before that event is written.
    """

    def __init__(
        self,
        journal: Journal,
        payload: Callable[[WriteName], Payload | None],
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        self.journal = journal
        self.behind: OSError | None = None
        self.refused = False
        self.late: Callable[[int], None] = lambda _: None
        self._payload = payload
        self._time_of_day = time_of_day
        self._rotated = 0  # a snapshot needs no segment before this one

    def __call__(self, happened: Event | Result, now: float) -> None:
        """Write an event down before it happens, or a result.

        Raises:
            NotDurable: an event could not be written; it must not happen.
        """
        if isinstance(happened, RESULTS):
            self._result(happened, now)
            return
        if self.behind is not None:
            raise not_durable(self.behind)
        try:
            place = self._placed(happened)
            body = msgpack.packb([EVENT, now, self._time_of_day(), write_down(happened), place])
            payload = None if place is None else Place(*place[:3])
            self.journal.append(body, room=len(body) + RESULT_BYTES, payload=payload)
            self.refused = False
        except OSError as exc:
            self.refused = True
            raise not_durable(exc) from exc

    def _result(self, result: Result, now: float) -> None:
        try:
            self.journal.append(msgpack.packb([RESULT, now, write_down(result)]))
        except OSError as exc:
            self.fall_behind(exc)

    def fall_behind(self, exc: OSError) -> None:
        """Note that the journal does not hold what has happened."""
        if self.behind is None:
            log.error("the journal cannot be written (%s); a snapshot has to take its place", exc)
            self.behind = exc

    def _placed(self, event: Event | Result) -> list[Any] | None:
        """Return where the payload of an event is, copied into the journal if it is not there."""
        if not isinstance(event, Push | Put | Append) or (payload := self._payload(event.head.name)) is None:
            return None
        if not payload.nbytes:
            return None
        if payload.place is None or payload.place[0] < self._rotated:
            self._copy(payload)
        elif not payload.plain:
            assert payload.memory is not None
            payload.digest = digest_of([payload.memory])
        else:
            segment, offset, _ = payload.place
            payload.place = segment, offset, payload.nbytes
            payload.digest = payload.digest or digest_of(payload.pieces)
        payload.pieces, payload.memory = (), None
        assert payload.place is not None
        if payload.place[0] < self.journal.segment:
            self.late(payload.place[0])
        return [*payload.place, payload.packed, payload.digest]

    def _copy(self, payload: Payload) -> None:
        """Copy a payload into the journal."""
        place, memory = self.journal.reserve(payload.nbytes)
        at = 0
        for piece in payload.pieces:
            memory[at : at + len(piece)] = piece
            at += len(piece)
        payload.place, payload.packed = tuple(place), True  # type: ignore[assignment]  # three numbers
        payload.digest = payload.digest or digest_of(payload.pieces)

    def reserve(self, nbytes: int) -> tuple[tuple[int, int, int], memoryview]:
        """Return a place in the journal, and its memory.

        Raises:
            NotDurable: the disk has no room.
        """
        if self.behind is not None:
            raise not_durable(self.behind)
        try:
            place, memory = self.journal.reserve(nbytes)
        except OSError as exc:
            self.refused = True
            raise not_durable(exc) from exc
        return tuple(place), memory  # type: ignore[return-value]  # three numbers

    def rotate(self) -> Position:
        """Begin a segment, and return where the journal goes on.

        Raises:
            OSError: the disk has no room for it.
        """
        self._rotated = self.journal.rotate()
        return Position(self.journal.number, self.journal.chain, self._rotated)


def read_events(reader: JournalReader, *, upto: int | None = None, check: bool = True) -> Iterator[Happened]:
    """Go through what was written down, each event with its results.

    A result that follows an unfinished one is an event of its own: what finished it.

    Args:
        reader: of the journal.
        upto: the number of the last record to read, of a journal that goes on being written; None for its end.
        check: whether the payloads are to be looked at, too.

    Raises:
        DamagedJournal: see `JournalReader.events`.
    """
    if upto is not None and reader.found.number >= upto:
        return

    def holds(written: WrittenRecord) -> bool:
        kind, *rest = msgpack.unpackb(written.body)
        payload = _payload_at(rest[3]) if kind == EVENT else None
        return payload is None or is_whole(payload, reader)

    last: Happened | None = None
    try:
        for each in reader.events(holds) if check else reader.events():
            kind, now, *rest = msgpack.unpackb(each.body)
            if kind == EVENT:
                if last is not None:
                    yield last
                at, written, place = rest
                last = Happened(read_back(written), now, _payload_at(place), [], at, each.chain)
            elif last is not None and not _unfinished(last):
                last.results.append(read_back(rest[0]))
                last.chains.append(each.chain)
            else:
                if last is not None:
                    yield last
                last = Happened(read_back(rest[0]), now, None, [], 0.0 if last is None else last.at, each.chain)
            if upto is not None and each.number >= upto:
                break
    except DamagedJournal:
        if last is not None:  # it holds
            yield last
        raise
    if last is not None:
        yield last


def is_whole(payload: Payload, reader: JournalReader) -> bool:
    """Return whether a payload is what was written down."""
    return digest_of([reader.payload(place_of(payload))]) == payload.digest


def _unfinished(happened: Happened) -> bool:
    last = happened.results[-1] if happened.results else happened.event
    return isinstance(last, Failed) and last.unfinished


def _payload_at(place: Sequence[Any] | None) -> Payload | None:
    if place is None:
        return None
    segment, offset, nbytes, packed, digest = place
    return Payload((), digest, (segment, offset, nbytes), packed)


def place_of(payload: Payload) -> Place:
    """Return where a payload is in the journal."""
    assert payload.place is not None
    return Place(*payload.place)


def memory_of_payload(payload: Payload | None, reader: JournalReader) -> memoryview:
    """Return the memory of a payload, up to the end of what `Room` took for it."""
    if payload is None:
        return memoryview(b"")
    segment, offset, nbytes = place_of(payload)
    return reader.payload(Place(segment, offset, nbytes if payload.packed else padded(nbytes)))


def waiting_push(head: PushHead, payload: Payload | None) -> list[Any]:
    """Return a push that waits as plain values, with the place of its gradients if it has any; see `read_waiting`."""
    place = None if payload is None or payload.place is None else [*payload.place, payload.packed, payload.digest.hex()]
    return [write_down(head).hex(), place]


def read_waiting(waiting: Iterable[Any]) -> Iterator[tuple[PushHead, Payload | None]]:
    """Yield the pushes that `waiting_push` described."""
    for head, place in waiting:
        push = read_back(bytes.fromhex(head))
        if place is None:
            yield push, None
        else:
            *at, packed, digest = place
            yield push, Payload((), bytes.fromhex(digest), tuple(at), packed)


def not_durable(exc: OSError) -> NotDurable:
    """Return the error for what cannot be kept."""
    why = exc.strerror or str(exc)
    return NotDurable(
        f"The server's disk cannot keep this: {why}. Nothing was acknowledged.",
        remedy="Make room on the server's data directory, or repair its disk; the same request succeeds then.",
        retry_after_s=1.0,
    )
