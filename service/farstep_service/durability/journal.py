"""The journal of one session: events in order, in segment files that are taken from the disk ahead and used again.

    reserve(nbytes)    room for a payload in the present segment, which is received straight into it
    append(body)       an event; it survives the process from now on, in the kernel's memory
    sync(number)       that event, and all before it, survive a loss of power; several who wait share one call
    rotate()           the next event begins a segment
    forget(segment)    segments before one are not needed any more: a snapshot holds what they led to

    os       an append is enough                     lost with the power: what the kernel had not written by then
    group    acknowledged after `sync`               one call for all who wait
    always   acknowledged after `sync`               one call for each

A disk that is full is found before anything is acknowledged: a segment's blocks are taken when it is made. A sync that
failed is final: the journal takes nothing any more, and raises the same error for everybody, until a snapshot has taken
the place of the segments that it was to sync, and these are forgotten.

A segment that is forgotten is used again, its file and its pages, unless a payload in it is still referred to: a body
may be arriving into it, or a step reading it. Then its file goes, and its memory stays until the last reference ends.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from dataclasses import dataclass
from typing import Final, Literal, final

from farstep_service.durability.reading import Recovered, name_of, segments_in
from farstep_service.durability.segments import (
    ALIGN,
    FIRST,
    NO_CHAIN,
    Place,
    Segment,
    boot_name,
    chained,
    padded,
    record_bytes,
)
from farstep_service.durability.storage import Storage
from farstep_service.failpoints import reached

Sync = Literal["os", "group", "always"]
SEGMENT_BYTES: Final = 64 << 20
"""Bytes of a segment, unless a payload needs more."""
BESIDE_BYTES: Final = 64 << 10
"""Room in a larger one beside that payload: for the event that names it, and for its result."""
SPARE_SEGMENTS: Final = 4
"""Segments that are kept to be used again, unless the caller says how many bytes."""
NOTHING: Final = Recovered(0, NO_CHAIN)
"""A journal that is not there yet."""
SPARE: Final = ".spare"
NEW: Final = ".new"


@dataclass(slots=True)
class _Kept:
    """A segment that is needed.

    Attributes:
        name, nbytes: of its file.
        written: its memory, if this journal has written it.
    """

    name: str
    nbytes: int
    written: Segment | None


@final
class Journal:
    """Write the events of one session. Any thread may call any method.

    Args:
        storage: the files.
        folder: where the segments are.
        sync: when an event may be acknowledged.
        after: what was found of it, if it was there before.
        segment: the number of the first segment that is written, behind those that are there; None: the next one.
        segment_bytes: the usual size of one; a multiple of 64 is made of it.
        spare_bytes: how many bytes of segments are kept at most to be used again; None: what was let go of last, or
            four of the usual size if that is more. So a session that goes on as before makes no new files.
        lazily: make the first segment when there is something to write.

    Attributes:
        sync_policy: `sync`.
        number, chain: of the last event.
        durable: the last event that is known to be on the disk. What was found at the start counts after the first
            sync, which includes it: a process that died may have left it in the kernel's memory.
        since_rotation: how many bytes were taken since `rotate`.
        rotated: the last event before that.
        failed: the error of the sync that failed; None while there is none, or when its segments are forgotten.

    Raises:
        OSError: the first segment cannot be made.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        sync: Sync,
        *,
        after: Recovered = NOTHING,
        segment: int | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        spare_bytes: int | None = None,
        lazily: bool = False,
    ) -> None:
        self.sync_policy: Sync = sync
        self.number, self.chain = after.number, after.chain
        self.durable = 0
        self.since_rotation = 0
        self.rotated = after.number
        self.failed: OSError | None = None
        self._failed_before = 0
        self._storage = storage
        self._folder = folder
        self._boot = boot_name(storage.boot)
        self._segment_bytes = padded(max(segment_bytes, FIRST + 2 * ALIGN))
        self._most_spare_bytes = spare_bytes
        self._spare_bytes = SPARE_SEGMENTS * self._segment_bytes if spare_bytes is None else spare_bytes
        self._kept_free = 0  # bytes at the end of the segment that only `append` may use
        self._writing = threading.Lock()  # taken inside `_syncing`, if both are
        self._syncing = threading.Lock()
        self._segments = {
            number: _Kept(name, storage.size(name), None) for number, name in segments_in(storage, folder)
        }
        # Files that were written since they were last synced, each with the event that was the last to say so.
        self._unsynced = {each.name: 0 for each in self._segments.values()}
        self._spares: list[tuple[str, memoryview | None]] = []
        last = max(self._segments, default=0)
        if segment is not None and segment <= last:
            raise ValueError(f"Segment {last} is there, so the next one cannot be {segment}.")
        self._adopt_spares()
        self._following = last + 1 if segment is None else segment
        self._present: Segment | None = None
        if not lazily:
            self._begin(self._segment_bytes)

    @property
    def segment(self) -> int:
        """Return the number of the segment that is written."""
        return self._following if self._present is None else self._present.number

    @property
    def first(self) -> int:
        """Return the number of the first segment that is kept; a payload in an older one has to be copied."""
        return min(self._segments, default=self._following)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the segments that are kept, without those that wait to be used again."""
        with self._writing:
            return sum(each.nbytes for each in self._segments.values())

    @property
    def spare_nbytes(self) -> int:
        """Return the bytes of the segments that wait to be used again."""
        return len(self._spares) * self._segment_bytes

    def reserve(self, nbytes: int) -> tuple[Place, memoryview]:
        """Return room for a payload, and where it is.

        Its memory stays what it is while anything refers to it, a slice or a tensor. Do not `release()` it: a tensor
        made of it would be left without memory.

        Raises:
            OSError: the disk has no room for it, or failed; nothing has changed.
        """
        with self._writing:
            self._raise_failed()
            present = self._with_room(record_bytes(nbytes) + self._kept_free)
            self.since_rotation += record_bytes(nbytes)
            return present.reserve(nbytes)

    def append(self, body: bytes, room: int = 0, *, payload: Place | None = None) -> int:
        """Write an event and return its number.

        Args:
            body: what it is.
            room: bytes of the next event's body, for which there will be room whatever is reserved meanwhile.
            payload: what `body` names. It may be in an older segment, which was synced while it was still arriving;
                then the next sync includes that segment again.

        Raises:
            OSError: the disk has no room for it, or failed; nothing has changed.
            ValueError: the segment of the payload is forgotten.
        """
        kept_free = record_bytes(room) if room else 0
        with self._writing:
            self._raise_failed()
            if payload is not None and payload.segment not in self._segments:
                raise ValueError(f"Segment {payload.segment} is forgotten, so that no event can name a payload in it.")
            present = self._with_room(record_bytes(len(body)) + kept_free)
            number = self.number + 1
            if payload is not None and payload.segment != present.number:
                self._unsynced[self._segments[payload.segment].name] = number
            chain = chained(self.chain, number, body)
            reached("journal.append.before")
            present.append(body, number, self.durable, chain)
            self.since_rotation += record_bytes(len(body))
            self.number, self.chain, self._kept_free = number, chain, kept_free
            reached("journal.append.after")
            return number

    def sync(self, number: int) -> None:
        """Return when an event is on the disk; waits for the disk.

        Raises:
            OSError: the disk failed, now or before. What it holds of the events that are not durable is unknown.
        """
        shared = self.sync_policy != "always"
        if shared and number <= self.durable:
            return
        with self._syncing:
            if shared and number <= self.durable:  # another call has included it
                return
            with self._writing:
                self._raise_failed()
                upto, unsynced = self.number, dict(self._unsynced)
                written = name_of(self._folder, self.segment)
            reached("journal.sync.before")
            try:
                for name in unsynced:
                    self._storage.sync(name)
            except OSError as exc:
                with self._writing:
                    self.failed, self._failed_before = exc, self._following
                raise
            with self._writing:
                for name, said in unsynced.items():
                    if name != written and self._unsynced[name] == said:
                        del self._unsynced[name]
                self.durable = max(self.durable, upto)
                if self._present is not None:
                    self._present.mark(self.durable)
            reached("journal.sync.after")

    def rotate(self, chain: bytes | None = None) -> int:
        """Begin a segment and return its number; also after a sync that failed.

        Args:
            chain: what its events are chained to; None for the last event. With another one, no reader comes to them
                from the events before.

        Raises:
            OSError: the disk has no room for it; the present one goes on.
        """
        reached("journal.rotate")
        with self._writing:
            present = self._present
            if present is not None and present.is_empty and chain is None and self.failed is None:
                return present.number  # the snapshot for which it was begun could not be written
            before = self.chain
            try:
                self.chain = before if chain is None else chain
                begun = self._begun_with_little_room()
            except OSError:
                self.chain = before
                raise
            self.since_rotation, self.rotated = 0, self.number
            return begun.number

    def go_on(self, number: int, segment: int) -> None:
        """Note where the last rotation of an earlier process was: the last event before it, and its segment."""
        with self._writing:
            self.rotated = number
            self.since_rotation = sum(each.nbytes for at, each in self._segments.items() if at >= segment)

    def forget(self, segment: int) -> None:
        """Let go of the segments before one, at most of those before the present one.

        Raises:
            OSError: a file could not be removed, or the disk failed; those that are there go with the next call.
        """
        reached("journal.forget.before")
        with self._syncing:
            with self._writing:
                old = {number: each for number, each in self._segments.items() if number < segment}
                old.pop(self.segment, None)
                if self._most_spare_bytes is None:
                    let_go = sum(each.nbytes for each in old.values())
                    self._spare_bytes = max(SPARE_SEGMENTS * self._segment_bytes, let_go)
            for number, each in old.items():
                spare = self._let_go(number, each)
                with self._writing:
                    del self._segments[number]
                    self._unsynced.pop(each.name, None)
                    self._spares += spare
            if old:
                self._storage.sync_names(self._folder)
            with self._writing:
                if self.failed is not None and self.first >= self._failed_before:
                    self.failed = None
        reached("journal.forget.after")

    def _let_go(self, number: int, kept: _Kept) -> list[tuple[str, memoryview | None]]:
        """Remove a segment's file, or keep it under another name, which is returned with its memory."""
        written, kept.written = kept.written, None
        wanted = kept.nbytes == self._segment_bytes and self.spare_nbytes + kept.nbytes <= self._spare_bytes
        if wanted and written is not None and self.failed is None:
            memory = self._storage.reuse(written.memory)
            if memory is not None:
                spare = f"{self._folder}/{number:08}{SPARE}"
                self._storage.rename(kept.name, spare)
                return [(spare, memory)]
        self._storage.remove(kept.name)
        return []

    def _raise_failed(self) -> None:
        if self.failed is not None:
            raise self.failed.with_traceback(None)

    def _with_room(self, nbytes: int) -> Segment:
        """Return the segment that is written, which has room for so much; begin one where it has not."""
        present = self._present
        if present is None or present.room < nbytes:
            fits = FIRST + nbytes <= self._segment_bytes
            size = self._segment_bytes if fits else FIRST + nbytes + min(BESIDE_BYTES, self._segment_bytes)
            present = self._begin(size)
        return present

    def _begun_with_little_room(self) -> Segment:
        """Begin a segment, a small one on a full disk: what fills it may be what the caller is about to forget."""
        try:
            return self._begin(self._segment_bytes)
        except OSError as exc:
            if exc.errno != errno.ENOSPC or self._segment_bytes <= BESIDE_BYTES:
                raise
            return self._begin(BESIDE_BYTES)

    def _begin(self, nbytes: int) -> Segment:
        """Make the next segment: its size, head and name, in this order, so that one with a name has the others.

        Raises:
            OSError: it could not be made; nothing has changed.
        """
        number = self._following
        name = name_of(self._folder, number)
        usual = nbytes == self._segment_bytes
        new = f"{self._folder}/{number:08}{NEW}"
        file, memory = self._spares.pop() if usual and self._spares else (new, None)
        try:
            if file == new:
                self._storage.create(file, nbytes)
                self._storage.sync(file)
            reached("journal.begin.created")
            memory = self._storage.map(file) if memory is None else memory
            segment = Segment(memory, number, self.chain, self._boot)
            reached("journal.begin.mapped")
            self._storage.rename(file, name)
            self._storage.sync_names(self._folder)
        except OSError:
            for each in (file, name):
                with contextlib.suppress(OSError):
                    self._storage.remove(each)
            raise
        reached("journal.begin.named")
        self._segments[number] = _Kept(name, nbytes, segment)
        self._unsynced[name] = 0
        self._present, self._following = segment, number + 1
        return segment

    def _adopt_spares(self) -> None:
        """Take over what an earlier process kept to use again, as far as it is of use."""
        for each in self._storage.names(self._folder):
            name = f"{self._folder}/{each}"
            if not each.endswith((SPARE, NEW)):
                continue
            has_room = self.spare_nbytes + self._segment_bytes <= self._spare_bytes
            if each.endswith(SPARE) and has_room and self._storage.size(name) == self._segment_bytes:
                self._spares.append((name, None))
            else:
                self._storage.remove(name)
