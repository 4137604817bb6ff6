"""Sessions from an archive, back into a data directory that no server owns at the time.

    what is there ──► newest snapshot that is whole ──► the segments behind it, as far as they are whole
                                                             │
          sessions/<id>, at once  ◄── sessions/<id>.new ◄── the chain of their events, checked

The manifest says that the session was restored. So the server that finds it goes on with it as another incarnation,
which names those before it: steps after what was archived are lost, and their workers are told that.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, final

import xxhash

from farstep.errors import DamagedJournal, InvalidOption, SessionExists
from farstep_service.durability.archive import JOURNAL, SEGMENT
from farstep_service.durability.directory import NEW, SESSIONS, DataDirectory
from farstep_service.durability.objects import Objects, open_objects
from farstep_service.durability.reading import JournalReader, name_of
from farstep_service.durability.recorder import read_events
from farstep_service.durability.snapshots import (
    CONTENTS,
    MANIFEST,
    STATE,
    Manifest,
    damaged_file,
    first_segment_in,
    numbers_in,
    said_in,
    text_of,
)
from farstep_service.durability.storage import Storage

log = logging.getLogger("farstep.archive")

IDENTITY: Final = re.compile(r"[0-9a-f]{32}")
"""The name of a session's folder, in a data directory and in an archive."""
RESTORED: Final = "restored"
"""The key of a manifest that was written by a restoration."""


@dataclass(frozen=True, slots=True)
class Archived:
    """A session in an archive.

    Attributes:
        identity: the folder that it is in.
        name: its name.
        version: of its newest snapshot.
        durability: what was kept of it.
        snapshot: the number of that snapshot.
        segments: how many closed segments of its journal are there.
        nbytes: of that snapshot.
    """

    identity: str
    name: str
    version: int
    durability: dict[str, Any]
    snapshot: int
    segments: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Restored:
    """A session that was restored.

    Attributes:
        name: its name now.
        version: of the snapshot.
        events: how many events of the journal follow it.
        dropped: what was not whole, and so left in the archive; empty for nothing.
    """

    name: str
    version: int
    events: int
    dropped: tuple[str, ...]


def archive_at(url: str) -> tuple[Objects, str]:
    """Return the archive at a URL, and which of its sessions the URL names; empty for none.

    Raises:
        InvalidOption: it is not the URL of a store.
    """
    root, _, last = url.rstrip("/").rpartition("/")
    if IDENTITY.fullmatch(last) and not root.endswith("/"):
        return open_objects(root), last
    return open_objects(url), ""


def archived_in(objects: Objects, identity: str = "") -> list[Archived]:
    """Return the sessions in an archive, or the one of that folder.

    Raises:
        OSError: the store does not answer.
    """
    found = []
    for each in [identity] if identity else objects.folders():
        names = objects.names(each)
        for number in reversed(_numbers(names)):
            with suppress(DamagedJournal, FileNotFoundError):
                said = said_in(objects.read(f"{each}/{number:08}{MANIFEST}"), f"{each}/{number:08}{MANIFEST}")
                segments = sum(name.endswith(SEGMENT) for name in names)
                nbytes = sum(known["bytes"] for known in said["files"].values())
                found.append(
                    Archived(each, said["name"], said["version"], said["durability"], number, segments, nbytes)
                )
                break
    return found


def restore(objects: Objects, identity: str, directory: DataDirectory, name: str | None = None) -> Restored:
    """Restore a session into a data directory; it is there whole when this returns, or not at all.

    Args:
        objects: the archive.
        identity: the folder of the session there.
        directory: where to; of the same lock as a server's.
        name: another name for the session.

    Raises:
        SessionExists: the directory has a session of that name.
        DamagedJournal: no snapshot in the archive is whole.
        OSError: the store does not answer, or the disk has no room; nothing has changed.
    """
    storage = directory.storage
    folder = directory.new_folder()
    part = folder + NEW
    dropped: list[str] = []
    try:
        number = _fetch_snapshot(_Fetching(objects, identity, storage, part), dropped)
        said = Manifest(storage, part, number).said
        _refuse_taken(directory, name or said["name"])
        events = _journaled(_Fetching(objects, identity, storage, part), number, dropped)
        said = {**said, RESTORED: True, "clean": False}
        if name is not None:
            said |= {"name": name, "session": {**said["session"], "name": name}}
        manifest = f"{part}/{number:08}{MANIFEST}"
        storage.write(manifest + NEW, [text_of(said)])
        storage.sync(manifest + NEW)
        storage.rename(manifest + NEW, manifest)
        storage.sync_names(part)
        Manifest(storage, part, number).plan()
        storage.rename(part, folder)
        storage.sync_names(SESSIONS)
    except BaseException:
        storage.remove(part)
        raise
    return Restored(said["name"], said["version"], events, tuple(dropped))


@final
@dataclass(frozen=True, slots=True)
class _Fetching:
    """Fetch objects of one session into a folder."""

    objects: Objects
    identity: str
    storage: Storage
    folder: str

    def fetch(self, name: str, path: str, nbytes: int, digest: str) -> None:
        """Fetch an object, and let it be on the disk.

        Raises:
            DamagedJournal: it is not there, or is not what was copied.
        """
        found, size = xxhash.xxh3_128(), 0

        def passing() -> Iterator[bytes]:
            nonlocal size
            for piece in self.objects.get(f"{self.identity}/{name}"):
                found.update(piece)
                size += len(piece)
                yield piece

        try:
            self.storage.write(path, passing())
        except FileNotFoundError as exc:
            raise damaged_file(f"{self.identity}/{name}", "it is not in the archive") from exc
        if size != nbytes or found.hexdigest() != digest:
            self.storage.remove(path)
            raise damaged_file(f"{self.identity}/{name}", "it is not what was copied")
        self.storage.sync(path)


def _fetch_snapshot(fetching: _Fetching, dropped: list[str]) -> int:
    """Fetch the newest snapshot that is whole, with the segments that it cannot do without, and return its number.

    Raises:
        DamagedJournal: there is none.
    """
    objects, identity, storage, folder = fetching.objects, fetching.identity, fetching.storage, fetching.folder
    names = objects.names(identity)
    for number in reversed(_numbers(names)):
        manifest = f"{number:08}{MANIFEST}"
        try:
            text = objects.read(f"{identity}/{manifest}")
            said = said_in(text, f"{identity}/{manifest}")
            for file, known in said["files"].items():
                if file not in (f"{number:08}{CONTENTS}", f"{number:08}{STATE}"):
                    raise damaged_file(f"{identity}/{manifest}", f"it names the file {file!r:.80}")
                fetching.fetch(file, f"{folder}/{file}", known["bytes"], known["xxh3_128"])
            first = first_segment_in(said)
            if first is not None:
                for segment in range(first, said["journal"]["segment"]):
                    _fetch_segment(fetching, segment)
            storage.write(f"{folder}/{manifest}", [text])
            Manifest(storage, folder, number).read()
        except DamagedJournal as exc:
            log.warning("snapshot %d is not whole, and an older one is taken: %s", number, exc.detail)
            dropped.append(exc.detail)
            storage.remove(folder)
            continue
        return number
    raise DamagedJournal(
        f"The archive holds no whole snapshot of {identity}.",
        remedy="Name another session of the archive, or another archive.",
        field=identity,
    )


def _fetch_segment(fetching: _Fetching, number: int) -> None:
    """Fetch a segment.

    Raises:
        DamagedJournal: it is not there, or not whole.
    """
    pointer = f"{number:08}{SEGMENT}"
    try:
        said = json.loads(fetching.objects.read(f"{fetching.identity}/{pointer}"))
        file, nbytes = str(said["file"]), int(said["bytes"])
    except FileNotFoundError as exc:
        raise damaged_file(f"{fetching.identity}/{pointer}", "it is not in the archive") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise damaged_file(f"{fetching.identity}/{pointer}", "it cannot be read") from exc
    stem, _, digest = file.removesuffix(JOURNAL).partition(".")
    if stem != f"{number:08}" or not file.endswith(JOURNAL):
        raise damaged_file(f"{fetching.identity}/{pointer}", f"it names the object {file!r:.80}")
    fetching.fetch(file, name_of(fetching.folder, number), nbytes, digest)


def _journaled(fetching: _Fetching, number: int, dropped: list[str]) -> int:
    """Fetch the segments behind a snapshot as far as they are whole, and return how many events they hold."""
    manifest = Manifest(fetching.storage, fetching.folder, number)
    position = manifest.position
    if position is None:
        return 0
    there = {int(each[:8]) for each in fetching.objects.names(fetching.identity) if each.endswith(SEGMENT)}
    fetched: list[int] = []
    for segment in sorted(each for each in there if each >= position.segment):
        if segment != position.segment + len(fetched):
            dropped.append(f"Segment {position.segment + len(fetched)} is not in the archive, and later ones are.")
            break
        try:
            _fetch_segment(fetching, segment)
        except DamagedJournal as exc:
            dropped.append(exc.detail)
            break
        fetched.append(segment)
    while True:
        reader = JournalReader(
            fetching.storage, fetching.folder, position.number, position.chain, manifest.first_segment or 0
        )
        try:
            events = sum(1 for _ in read_events(reader))
        except DamagedJournal as exc:
            if not fetched:
                raise
            dropped.append(exc.detail)
            fetching.storage.remove(name_of(fetching.folder, fetched.pop()))
            continue
        if reader.found.dropped is not None:
            dropped.append("{} holds up to byte {} only.".format(*reader.found.dropped))
        return events


def _refuse_taken(directory: DataDirectory, name: str) -> None:
    """Refuse the name of a session that the directory has.

    Raises:
        SessionExists: it is taken.
    """
    for folder in directory.folders():
        for number in reversed(numbers_in(directory.storage, folder)):
            with suppress(DamagedJournal, OSError):
                if Manifest(directory.storage, folder, number).said["name"] == name:
                    raise SessionExists(
                        f"{directory.path} has a session {name!r} already.",
                        remedy="Give the restored one another name: --as NAME.",
                        field="name",
                    )
                break


def one_of(found: list[Archived], url: str) -> Archived:
    """Return the only session that was found.

    Raises:
        InvalidOption: there is none, or several.
    """
    if len(found) == 1:
        return found[0]
    if not found:
        raise InvalidOption(
            f"There is no session at {url}.", remedy="Give the URL that the server had as --archive.", field="url"
        )
    raise InvalidOption(
        f"There are {len(found)} sessions at {url}.",
        remedy=f"Name one of them: {url.rstrip('/')}/{found[0].identity}",
        field="url",
    )


def _numbers(names: list[str]) -> list[int]:
    stems = [each.removesuffix(MANIFEST) for each in names if each.endswith(MANIFEST)]
    return sorted(int(stem) for stem in stems if stem.isdecimal())
