"""A storage whose power fails: a log of all that was done, and the disks that it can leave behind.

    what was synced is there                       the bytes of a file by `sync`, the names of a folder by `sync_names`
    what was not may be there or not               in sectors of 512 bytes
    writes arrive in their order, but for three    some behind the cut arrive, or some before it do not
    the one at the cut is torn                     any of its sectors arrive

Memory that is mapped is compared with what it was at every call, and at `observe`; each difference is one write.
"""

from __future__ import annotations

import mmap
import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from farstep_service.durability.storage import Storage

SECTOR = 512
REORDERED = 3
_boots = count(1)


@dataclass(eq=False, slots=True)
class File:
    """One file, under whatever names.

    Attributes:
        memory: what the processes of the machine see.
        seen: what it was when it was looked at last.
        disk: what was on the disk when the machine was started.
    """

    memory: mmap.mmap | None
    seen: bytes
    disk: bytes = b""

    @classmethod
    def of(cls, contents: bytes, disk: bytes = b"") -> File:
        if not contents:
            return cls(None, b"", disk)
        memory = mmap.mmap(-1, len(contents))
        memory[:] = contents
        return cls(memory, contents, disk)


@dataclass(frozen=True, slots=True)
class Resized:
    file: File
    nbytes: int


@dataclass(frozen=True, slots=True)
class Wrote:
    file: File
    sectors: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class Named:
    """A name that was given, taken away (`file` is None), or moved from another (`old`)."""

    name: str
    file: File | None
    old: str = ""


@dataclass(frozen=True, slots=True)
class Synced:
    what: File | str
    """A file, or a folder whose names were synced."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A sync that failed: what was not on the disk never gets there."""

    file: File


Operation = Resized | Wrote | Named | Synced | Lost


@dataclass(slots=True)
class PowerStorage(Storage):
    """Files in memory, and the log of how they came about.

    Attributes:
        files: by their names.
        log: all that was done since the machine was started.
    """

    files: dict[str, File] = field(default_factory=dict)
    log: list[Operation] = field(default_factory=list)
    on_disk: dict[str, File] = field(default_factory=dict)
    _boot: bytes = b""
    _alive: list[File] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._boot = b"boot %d" % next(_boots)
        self._alive = [*self.files.values()]
        self.on_disk = dict(self.files)

    @property
    def boot(self) -> bytes:
        return self._boot

    def create(self, name: str, nbytes: int) -> None:
        self.observe()
        if name in self.files:
            raise FileExistsError(name)
        self._add(name, bytes(nbytes))

    def map(self, name: str, *, writable: bool = True) -> memoryview:
        self.observe()
        file = self._file(name)
        return memoryview(file.memory if writable and file.memory is not None else bytearray(file.seen))

    def reuse(self, memory: memoryview) -> memoryview | None:
        self.observe()
        mapping = memory.obj
        memory.release()
        if not isinstance(mapping, mmap.mmap):
            return memoryview(b"")
        (file,) = (each for each in self._alive if each.memory is mapping)
        try:
            mapping.close()
        except BufferError:
            return None
        file.memory = File.of(file.seen).memory
        return self.map(next(name for name, each in self.files.items() if each is file))

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        self.observe()
        contents = b"".join(bytes(piece) for piece in pieces)
        self._add(name, contents)
        return len(contents)

    def sync(self, name: str) -> None:
        self.observe()
        self.log.append(Synced(self._file(name)))

    def lose(self, name: str) -> None:
        """Fail to sync a file: the kernel takes what it could not write for written."""
        self.observe()
        self.log.append(Lost(self._file(name)))

    def sync_names(self, folder: str) -> None:
        self.observe()
        self.log.append(Synced(folder))

    def rename(self, old: str, new: str) -> None:
        self.observe()
        moved = [name for name in self.files if name == old or name.startswith(f"{old}/")]
        if not moved:
            raise FileNotFoundError(old)
        for name in moved:
            target = new + name.removeprefix(old)
            self.log.append(Named(target, self.files[name], name))
            self.files[target] = self.files.pop(name)

    def remove(self, name: str) -> None:
        self.observe()
        for each in [each for each in self.files if each == name or each.startswith(f"{name}/")]:
            self.log.append(Named(each, None))
            del self.files[each]

    def names(self, folder: str) -> Sequence[str]:
        inside = (name.removeprefix(f"{folder}/") for name in self.files if name.startswith(f"{folder}/"))
        return sorted({name.partition("/")[0] for name in inside})

    def size(self, name: str) -> int:
        return len(self._file(name).seen)

    def free_bytes(self) -> int:
        return 1 << 40

    def observe(self) -> None:
        """Note what has changed in memory."""
        for file in self._alive:
            if file.memory is None or file.memory[:] == file.seen:
                continue
            now = file.memory[:]
            changed = {
                at: now[at : at + SECTOR]
                for at in range(0, len(now), SECTOR)
                if now[at : at + SECTOR] != file.seen[at : at + SECTOR]
            }
            file.seen = now
            self.log.append(Wrote(file, changed))

    def crash(self, chance: random.Random, cut: int | None = None) -> PowerStorage:
        """Return what the disk may hold if the power fails.

        Args:
            chance: decides what arrives.
            cut: after how many operations it fails; None: after all.
        """
        self.observe()
        done = self.log[:cut]
        certain, possible = _arrived(done)
        torn = chance.randrange(len(possible) + 1)
        arrived = {*certain, *possible[:torn]}
        near = possible[max(0, torn - 8) : torn + 8]
        for at in chance.sample(near, min(len(near), chance.randrange(REORDERED + 1))):
            arrived ^= {at}
        names, contents = dict(self.on_disk), {file: bytearray(file.disk) for file in self._all(done)}
        for at, each in enumerate(done):
            half = torn < len(possible) and at == possible[torn] and at not in arrived
            if at in arrived or half:
                _apply(each, names, contents, chance if half else None)
        return PowerStorage({name: File.of(bytes(contents[it]), bytes(contents[it])) for name, it in names.items()})

    def _all(self, done: Iterable[Operation]) -> set[File]:
        return {*self.on_disk.values(), *(file for each in done if isinstance(file := _file_of(each), File))}

    def _add(self, name: str, contents: bytes) -> None:
        file = File.of(contents)
        self._alive.append(file)
        self.log.append(Named(name, file))
        self.log.append(Resized(file, len(contents)))
        if any(contents):
            self.log.append(Wrote(file, _sectors(contents)))
        self.files[name] = file

    def _file(self, name: str) -> File:
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]


def _sectors(contents: bytes) -> dict[int, bytes]:
    return {at: contents[at : at + SECTOR] for at in range(0, len(contents), SECTOR)}


def _file_of(operation: Operation) -> File | str | None:
    return operation.what if isinstance(operation, Synced) else operation.file


def _arrived(done: Sequence[Operation]) -> tuple[set[int], list[int]]:
    """Return which operations are on the disk, and which may be."""
    syncs: defaultdict[File | str, list[int]] = defaultdict(list)
    losses: defaultdict[File, list[int]] = defaultdict(list)
    for at, each in enumerate(done):
        if isinstance(each, Synced):
            syncs[each.what].append(at)
        elif isinstance(each, Lost):
            losses[each.file].append(at)
    certain, possible = set[int](), list[int]()
    for at, each in enumerate(done):
        if isinstance(each, Synced | Lost):
            continue
        by = each.name.rpartition("/")[0] if isinstance(each, Named) else each.file
        later = syncs[by]
        synced = later[place] if (place := bisect_left(later, at)) < len(later) else len(done)
        if isinstance(by, File) and any(at < lost < synced for lost in losses[by]):
            continue
        if synced < len(done):
            certain.add(at)
        else:
            possible.append(at)
    return certain, possible


def _apply(
    operation: Operation, names: dict[str, File], contents: dict[File, bytearray], torn: random.Random | None
) -> None:
    match operation:
        case Resized(file, nbytes):
            contents[file] = contents[file][:nbytes] + bytes(nbytes - len(contents[file]))
        case Wrote(file, sectors):
            for at, sector in sectors.items():
                if at + len(sector) <= len(contents[file]) and (torn is None or torn.random() < 0.5):
                    contents[file][at : at + len(sector)] = sector
        case Named(name, None):
            names.pop(name, None)
        case Named(name, file, old) if file is not None:
            if not old or names.get(old) is file:
                names.pop(old, None)
                names[name] = file
