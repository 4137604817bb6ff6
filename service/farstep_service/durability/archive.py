"""Copies of sessions in a store elsewhere: their snapshots, and the segments of their journals that are closed.

    <id>/00000003.safetensors, .state      the files of snapshot 3, as they are on the disk
    <id>/00000003.json                     its manifest, the last of them: a snapshot is there when this is
    <id>/00000007.<xxh3_128>.journal       segment 7, once events go to a later one
    <id>/00000007.segment                  which object that is, and how many bytes it has

One thread copies what is on the disk already, so no step waits for a store, and none fails with it. What could not be
copied is tried again when the next snapshot is complete, or the next segment closed. `KEPT` snapshots are kept, as on
the disk: an older one goes when the manifest of a newer one is there.

A closed segment may still change: a body that began to arrive while it was written goes on arriving there, and is named
by an event of a later segment. Then it is copied again, before that later segment is.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, final

import xxhash

from farstep.errors import DamagedJournal
from farstep_service.durability.objects import PIECE_BYTES, Objects
from farstep_service.durability.reading import segments_in
from farstep_service.durability.snapshots import KEPT, MANIFEST, first_segment_in, numbers_in, said_in
from farstep_service.durability.storage import Storage

log = logging.getLogger("farstep.archive")

JOURNAL: Final = ".journal"
SEGMENT: Final = ".segment"
END_S: Final = 5.0
"""Seconds that a server waits at its end for what is under way."""
NAMED: Final = 10
"""Sessions that one line of the log names."""


class _Changed(OSError):
    """The file is not what it was when its copy began."""


class _Stopped(OSError):
    """The session is removed, or the server ends."""


@final
class SessionArchive:
    """The copy of one session.

    Args:
        objects: the store.
        storage, folder: where the session is kept.
        name: of the session, for the log.
        want: asks for `bring`, which is called by another thread then.
        segment: returns the segment that is written; None: the session has no journal.

    Attributes:
        name: as above.
        version: that of the newest snapshot in the store; None while none is known to be there.
        late: segments that an event of a later one refers to; the writer of that event appends them.
    """

    def __init__(
        self,
        objects: Objects,
        storage: Storage,
        folder: str,
        name: str,
        want: Callable[[SessionArchive], None],
        segment: Callable[[], int] | None = None,
    ) -> None:
        self.name = name
        self.version: int | None = None
        self.late: deque[int] = deque()
        self._objects, self._storage, self._folder = objects, storage, folder
        self._want, self._segment = want, segment
        self._id = folder.rpartition("/")[2]
        self._closed = 0 if segment is None else segment()
        self._copied: set[int] = set()  # segments
        self._again: set[int] = set()
        self._snapshots: dict[int, tuple[int, int | None]] | None = None  # version, and the first segment it needs
        self._failed = ""
        self._stopped = False

    def want(self) -> None:
        """Note that a snapshot is complete."""
        self._want(self)

    def written(self) -> None:
        """Note that something was written; if that closed a segment, it is copied."""
        if self._segment is not None and (segment := self._segment()) != self._closed:
            self._closed = segment
            self._want(self)

    def stop(self) -> None:
        """Copy nothing more; what is there stays."""
        self._stopped = True

    def bring(self) -> None:
        """Copy what is not in the store yet; what fails is logged once, and tried again by the next call."""
        if self._stopped:
            return
        try:
            self._bring()
        except (OSError, DamagedJournal) as exc:
            if isinstance(exc, _Stopped) or not numbers_in(self._storage, self._folder):  # it ended meanwhile
                return
            self._snapshots = None  # what is there has to be looked at again
            self._copied.clear()
            level = logging.DEBUG if self._failed else logging.WARNING
            self._failed = str(exc)
            log.log(level, "session %s: it is not in the archive as it is on the disk: %s", self.name, exc)
        else:
            if self._failed:
                log.warning("session %s: it is in the archive again, at version %s", self.name, self.version)
            self._failed = ""

    def _bring(self) -> None:
        upto = None if self._segment is None else self._segment()
        while self.late:  # what an event before `upto` refers to is there by now
            self._again.add(self.late.popleft())
        if self._snapshots is None:
            self._snapshots = self._found()
        for number, name in segments_in(self._storage, self._folder):
            if upto is not None and number < upto and (number not in self._copied or number in self._again):
                self._copy_segment(number, name)
        newest = numbers_in(self._storage, self._folder)[-1:]
        for number in newest:
            if number not in self._snapshots:
                self._snapshots[number] = self._copy_snapshot(number)
                self._prune(self._snapshots)
        self.version = self._snapshots[max(self._snapshots)][0] if self._snapshots else None

    def _found(self) -> dict[int, tuple[int, int | None]]:
        """Return the snapshots that are in the store, as far as their manifests hold."""
        found = {}
        for name in self._objects.names(self._id):
            stem = name.removesuffix(MANIFEST)
            if stem != name and stem.isdecimal():
                try:
                    said = said_in(self._objects.read(f"{self._id}/{name}"), name)
                except DamagedJournal:
                    continue
                found[int(stem)] = said["version"], first_segment_in(said)
        return found

    def _copy_segment(self, number: int, name: str) -> None:
        pointer = f"{self._id}/{number:08}{SEGMENT}"
        try:
            memory = self._storage.map(name, writable=False)
        except FileNotFoundError:  # forgotten meanwhile: a snapshot has what it led to
            return
        digest = xxhash.xxh3_128_hexdigest(memory)
        file = f"{number:08}.{digest}{JOURNAL}"
        if number in self._copied or self._pointed(pointer) != file:
            try:
                self._objects.put(f"{self._id}/{file}", self._pieces(memory, digest, name))
            except _Changed as exc:
                log.debug("session %s: %s", self.name, exc)
                return
            self._objects.put(pointer, [json.dumps({"file": file, "bytes": len(memory)}).encode()])
            for each in self._objects.names(self._id) if number in self._copied else ():
                if each.startswith(f"{number:08}.") and each.endswith(JOURNAL) and each != file:
                    self._objects.remove(f"{self._id}/{each}")
        self._copied.add(number)
        self._again.discard(number)

    def _pointed(self, pointer: str) -> str:
        """Return the object that holds a segment; empty for none."""
        try:
            return str(json.loads(self._objects.read(pointer))["file"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return ""

    def _copy_snapshot(self, number: int) -> tuple[int, int | None]:
        manifest = f"{number:08}{MANIFEST}"
        text = bytes(self._storage.map(f"{self._folder}/{manifest}", writable=False))
        said = said_in(text, manifest)
        for file, known in said["files"].items():
            path = f"{self._folder}/{file}"
            memory = self._storage.map(path, writable=False)
            self._objects.put(f"{self._id}/{file}", self._pieces(memory, known["xxh3_128"], path))
        self._objects.put(f"{self._id}/{manifest}", [text])
        return said["version"], first_segment_in(said)

    def _pieces(self, memory: memoryview, digest: str, path: str) -> Iterator[memoryview]:
        """Yield what a file holds, and raise an error behind it if that was not what it is to be.

        A segment that was forgotten is written over under another name, so one that still has its name was not.
        """
        found = xxhash.xxh3_128()
        for at in range(0, len(memory), PIECE_BYTES):
            if self._stopped:
                raise _Stopped(None, "the session ended")
            piece = memory[at : at + PIECE_BYTES]
            found.update(piece)
            yield piece
        if found.hexdigest() != digest:
            raise _Changed(None, f"{path} changed while it was copied")
        try:
            self._storage.size(path)
        except FileNotFoundError:
            raise _Changed(None, f"{path} was removed while it was copied") from None

    def _prune(self, snapshots: dict[int, tuple[int, int | None]]) -> None:
        """Remove what no snapshot that is kept needs, manifests first."""
        kept = sorted(snapshots)[-KEPT:]
        needed = [first for first in (snapshots[each][1] for each in kept) if first is not None]
        for number in [each for each in snapshots if each < kept[0]]:
            self._objects.remove(f"{self._id}/{number:08}{MANIFEST}")
            del snapshots[number]
        for name in self._objects.names(self._id):
            stem = name.partition(".")[0]
            if not stem.isdecimal():
                continue
            of_journal = name.endswith((SEGMENT, JOURNAL))
            if int(stem) < (min(needed, default=0) if of_journal else kept[0]):
                self._objects.remove(f"{self._id}/{name}")
                self._copied.discard(int(stem))


@final
class Archiver:
    """Copy the sessions of one server, one after the other, in a thread.

    Args:
        objects: the store.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._changes = threading.Condition()
        self._wanted: dict[SessionArchive, None] = {}
        self._ended = False
        self._present: SessionArchive | None = None
        self._thread: threading.Thread | None = None

    def session(
        self, storage: Storage, folder: str, name: str, segment: Callable[[], int] | None = None
    ) -> SessionArchive:
        """Return the copy of a session; see `SessionArchive`."""
        return SessionArchive(self._objects, storage, folder, name, self._want, segment)

    def close(self, most_s: float = END_S) -> None:
        """Wait for what is wanted, but not longer than that; nothing begins from now on."""
        until = time.monotonic() + most_s
        with self._changes:
            while (self._wanted or self._present is not None) and (left_s := until - time.monotonic()) > 0:
                self._changes.wait(left_s)
            behind = {*self._wanted, *([] if self._present is None else [self._present])}
            if behind:
                named = sorted(each.name for each in behind)[:NAMED]
                log.warning("%d not in the archive as they are now: %s", len(behind), ", ".join(named))
            self._ended = True
            self._wanted.clear()
            if self._present is not None:
                self._present.stop()
            self._changes.notify_all()

    def _want(self, session: SessionArchive) -> None:
        with self._changes:
            if self._ended:
                return
            self._wanted[session] = None
            if self._thread is None:  # a daemon: a store that does not answer must not keep the process
                self._thread = threading.Thread(target=self._copy, name="farstep-archive", daemon=True)
                self._thread.start()
            self._changes.notify_all()

    def _copy(self) -> None:
        while True:
            with self._changes:
                self._present = None
                self._changes.notify_all()
                while not self._wanted and not self._ended:
                    self._changes.wait()
                if self._ended:
                    return
                session = next(iter(self._wanted))
                del self._wanted[session]
                self._present = session
            try:
                session.bring()
            except Exception:
                log.exception("a session could not be copied to the archive")
