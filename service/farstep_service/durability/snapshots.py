"""Snapshots of one session on the disk: everything that it is at one moment, and where its journal goes on.

    00000003.safetensors     its contents, as `farstep sessions export` writes them; none before the first contents
    00000003.state           what else it is: its coordinator, rounds that are accumulated, versions that are kept
    00000003.json            the manifest: what the session is, where its journal goes on, and each file's size and
                             xxh3_128; a second line has the xxh3_128 of the first

Each file is written under another name, synced, renamed, and its name synced; the manifest comes last. So a snapshot
is there when its manifest is, and an older one is let go of only then. Gradients that wait are not copied: the
manifest says where the journal has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

import torch
import xxhash
from torch import Tensor

from farstep.errors import DamagedJournal, FarstepError
from farstep.protocol.durability import NONE, from_document, to_document
from farstep.protocol.memory import tensor_memory
from farstep.protocol.tensor_file import LENGTH_BYTES, head_length, read_head
from farstep_service.durability.session_file import (
    describe,
    file_of,
    options_in,
    places_of,
    plan_in,
    snapshot_in,
)
from farstep_service.durability.storage import Storage
from farstep_service.failpoints import reached
from farstep_service.plan import Plan
from farstep_service.tensors import Snapshot, TensorsRecord
from farstep_service.tensors.policies import Accumulated, layout_of, taken
from farstep_service.tensors.staleness import Kept

FORMAT: Final = 1
MANIFEST: Final = ".json"
CONTENTS: Final = ".safetensors"
STATE: Final = ".state"
PART: Final = ".part"
KEPT: Final = 2
"""Snapshots that are kept."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a journal goes on behind a snapshot.

    Attributes:
        number, chain: of the last event before it.
        segment: the first segment with events after it.
    """

    number: int
    chain: bytes
    segment: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """All that a session is, as a snapshot keeps it.

    Attributes:
        incarnation: of its ledger.
        predecessors: incarnations before it, of which acknowledged steps were lost.
        coordinator: what its coordinator is, written down.
        tensors: its tensors, without the gradients that wait.
        waiting: the pushes that wait, as plain values.
        now: the time of its clock, in seconds.
        position: where its journal goes on; None without a journal.
        clean: it was written when the session ended in order, and nothing was acknowledged after it.
    """

    incarnation: str
    predecessors: tuple[str, ...]
    coordinator: bytes
    tensors: TensorsRecord
    waiting: tuple[Any, ...] = ()
    now: float = 0.0
    position: Position | None = None
    clean: bool = False

    @property
    def version(self) -> int:
        """Return the version of the contents, 0 before the first."""
        return 0 if self.tensors.snapshot is None else self.tensors.snapshot.version


@final
@dataclass(slots=True)
class _Writer:
    """Write the files of one snapshot, and note what the manifest says of them."""

    storage: Storage
    folder: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        digest, size = xxhash.xxh3_128(), 0

        def passing() -> Iterator[bytes | memoryview]:
            nonlocal size
            for piece in pieces:
                digest.update(piece)
                size += len(piece)
                yield piece

        self.put(name, passing())
        self.files[name] = {"bytes": size, "xxh3_128": digest.hexdigest()}

    def put(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        path, storage = f"{self.folder}/{name}", self.storage
        storage.write(path + PART, pieces)
        reached("snapshot.written")
        storage.sync(path + PART)
        reached("snapshot.synced")
        storage.rename(path + PART, path)
        reached("snapshot.renamed")
        storage.sync_names(self.folder)
        reached("snapshot.named")


def write_snapshot(storage: Storage, folder: str, number: int, saved: Saved) -> None:
    """Write a snapshot; it is on the disk when this returns.

    Raises:
        OSError: it could not be written; those before it are still there.
    """
    try:
        _write(storage, folder, number, saved)
    except OSError:
        for suffix in (MANIFEST, STATE, CONTENTS):
            for name in (f"{number:08}{suffix}", f"{number:08}{suffix}{PART}"):
                with suppress(OSError):
                    storage.remove(f"{folder}/{name}")
        raise


def _write(storage: Storage, folder: str, number: int, saved: Saved) -> None:
    record, stem = saved.tensors, f"{number:08}"
    writer = _Writer(storage, folder)
    snapshot = record.snapshot
    if snapshot is not None:
        writer.write(stem + CONTENTS, file_of(snapshot))
    said, tensors = _state_of(record)
    reached("snapshot.state")
    writer.write(stem + STATE, [saved.coordinator, *(tensor_memory(each.cpu().contiguous()) for each in tensors)])
    shapes = {} if snapshot is None else snapshot.contents.shapes
    position = saved.position
    manifest = {
        "format": FORMAT,
        "name": record.plan.name,
        "durability": to_document(record.plan.durability or NONE),
        "incarnation": saved.incarnation,
        "predecessors": [*saved.predecessors],
        "clean": saved.clean,
        "version": saved.version,
        "now": saved.now,
        "journal": None
        if position is None
        else {"number": position.number, "chain": position.chain.hex(), "segment": position.segment},
        "files": writer.files,
        "state": {"coordinator": len(saved.coordinator), **said},
        "waiting": [*saved.waiting],
        "session": describe(record.plan, record.groups, saved.version, shapes),
    }
    text = text_of(manifest)
    reached("snapshot.manifest")
    writer.put(stem + MANIFEST, [text])


def _state_of(record: TensorsRecord) -> tuple[dict[str, Any], list[Tensor]]:
    """Return what a session is beside its contents and its coordinator: plain values, and tensors."""
    accumulated, tensors = record.accumulated.to_document()
    bases = [(worker, each) for worker, each in record.bases.items()]
    return {
        "accumulated": accumulated,
        "bases": [[worker, each.version, each.buffers.layout.groups] for worker, each in bases],
    }, [*tensors, *(tensor for _, each in bases for tensor in each.buffers.flat.values())]


@final
class Manifest:
    """The manifest of a snapshot.

    Args:
        storage, folder, number: where it is.

    Attributes:
        said: what it says.

    Raises:
        DamagedJournal: it is damaged.
    """

    def __init__(self, storage: Storage, folder: str, number: int) -> None:
        self._storage, self._folder, self.number = storage, folder, number
        name = f"{folder}/{number:08}{MANIFEST}"
        self.said: dict[str, Any] = said_in(bytes(storage.map(name, writable=False)), name)

    @property
    def position(self) -> Position | None:
        """Return where the journal goes on; None without a journal."""
        journal = self.said["journal"]
        if journal is None:
            return None
        return Position(journal["number"], bytes.fromhex(journal["chain"]), journal["segment"])

    @property
    def first_segment(self) -> int | None:
        """Return the first segment of the journal that this snapshot needs."""
        return first_segment_in(self.said)

    @property
    def has_contents(self) -> bool:
        """Return whether the first contents had arrived."""
        return f"{self.number:08}{CONTENTS}" in self.said["files"]

    def plan(self) -> Plan:
        """Return what the session is."""
        return replace(plan_in(self.said["session"]), durability=from_document(self.said["durability"]))

    def read(self) -> Saved:
        """Return what the snapshot holds, its files checked.

        Raises:
            DamagedJournal: a file is damaged, or not there.
        """
        said = self.said
        try:
            plan = self.plan()
            described, state = said["session"], self._file(STATE)
            coordinator = bytes(state[: said["state"]["coordinator"]])
            contents = f"{self.number:08}{CONTENTS}"
            snapshot = self._contents(plan) if contents in said["files"] else None
            groups = options_in(described, plan) if snapshot is None else snapshot.groups
        except (FarstepError, OSError, KeyError, ValueError) as exc:
            if isinstance(exc, DamagedJournal):
                raise
            raise damaged_file(f"{self._folder}/{self.number:08}", f"it cannot be read ({exc})") from exc
        take = _Taking(state, len(coordinator))
        accumulated = Accumulated.from_document(said["state"]["accumulated"], plan.layout, take)
        bases = {
            worker: Kept(version, taken(layout_of(plan.layout, groups_then), take))
            for worker, version, groups_then in said["state"]["bases"]
        }
        tensors = TensorsRecord(plan, groups, snapshot, accumulated, bases, {})
        return Saved(
            incarnation=said["incarnation"],
            predecessors=tuple(said["predecessors"]),
            coordinator=coordinator,
            tensors=tensors,
            waiting=tuple(said["waiting"]),
            now=said["now"],
            position=self.position,
            clean=said["clean"],
        )

    def _contents(self, plan: Plan) -> Snapshot:
        file = self._file(CONTENTS)
        length = head_length(bytes(file[:LENGTH_BYTES]), len(file))
        at = LENGTH_BYTES + length
        head = read_head(bytes(file[LENGTH_BYTES:at]), len(file) - at)
        snapshot = snapshot_in(head, self.said["session"], plan)
        for place in places_of(head, snapshot.contents):
            copy_(place, file[at : at + len(place)])
            at += len(place)
        return snapshot

    def _file(self, suffix: str) -> memoryview:
        name = f"{self.number:08}{suffix}"
        path, known = f"{self._folder}/{name}", self.said["files"][name]
        try:
            file = self._storage.map(path, writable=False)
        except OSError as exc:
            raise damaged_file(path, f"it cannot be read ({exc.strerror})") from exc
        if len(file) != known["bytes"]:
            raise damaged_file(path, f"it has {len(file)} bytes, and its manifest says {known['bytes']}")
        if xxhash.xxh3_128_hexdigest(file) != known["xxh3_128"]:
            raise damaged_file(path, "its checksum is another one")
        return file


@final
class _Taking:
    """Take one tensor after the other from a file, each in memory of its own."""

    def __init__(self, file: memoryview, at: int) -> None:
        self._file, self._at = file, at

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(*shape, dtype=dtype, device="cpu")
        memory = tensor_memory(tensor)
        copy_(memory, self._file[self._at : self._at + len(memory)])
        self._at += len(memory)
        return tensor


def copy_(into: memoryview, source: memoryview) -> None:
    """Copy bytes; much of them without holding the interpreter."""
    if len(into) < 1 << 16:
        into[:] = source
        return
    torch.frombuffer(into, dtype=torch.uint8).copy_(torch.frombuffer(source, dtype=torch.uint8))


def said_in(text: bytes, name: str) -> dict[str, Any]:
    """Return what the text of a manifest says.

    Args:
        name: of its file, for errors.

    Raises:
        DamagedJournal: it is damaged, or of a newer format.
    """
    first, _, rest = text.partition(b"\n")
    if rest != xxhash.xxh3_128_hexdigest(first).encode() + b"\n":
        raise damaged_file(name, "its checksum is another one")
    said: dict[str, Any] = json.loads(first)
    if said["format"] > FORMAT:
        raise DamagedJournal(
            f"{name} has the format {said['format']}, and this release reads up to {FORMAT}.",
            remedy="Use the release that wrote it, or a newer one.",
            field=name,
        )
    return said


def text_of(said: dict[str, Any]) -> bytes:
    """Return the text of a manifest that says this."""
    text = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
    return b"%b\n%b\n" % (text, xxhash.xxh3_128_hexdigest(text).encode())


def first_segment_in(said: dict[str, Any]) -> int | None:
    """Return the first segment of the journal that a snapshot needs; None without a journal."""
    journal = said["journal"]
    return None if journal is None else first_segment(journal["segment"], said["waiting"])


def first_segment(segment: int, waiting: Sequence[Any]) -> int:
    """Return the first segment that is needed from one on, and by pushes that wait (`recorder.waiting_push`)."""
    return min([segment, *(int(place[0]) for _, place in waiting if place is not None)])


def numbers_in(storage: Storage, folder: str) -> list[int]:
    """Return the numbers of the snapshots whose manifest is there, ascending."""
    stems = [each.removesuffix(MANIFEST) for each in storage.names(folder) if each.endswith(MANIFEST)]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def forget_snapshots(storage: Storage, folder: str, before: int) -> None:
    """Remove the snapshots before a number, their manifests first, and what was never finished."""
    names = storage.names(folder)
    for suffix in (MANIFEST, CONTENTS, STATE):
        for name in names:
            stem = name.removesuffix(suffix)
            if stem != name and stem.isdecimal() and int(stem) < before:
                reached("snapshot.forget")
                storage.remove(f"{folder}/{name}")
    storage.sync_names(folder)
    reached("snapshot.forgotten")


def damaged_file(name: str, what: str) -> DamagedJournal:
    """Return the error for a file that is not what was written."""
    return DamagedJournal(
        f"{name} is damaged: {what}.", remedy="`farstep sessions fsck` says what can be saved.", field=name
    )
