"""Versions of the parameters: a version that a reader holds never changes.

    v has no holder    the step writes over v, in place
    v has holders      the step writes v+1 into other memory, the spare one or new; v is freed with its last holder
    released           its memory becomes the spare; a spare that some steps in a row did not need is freed
    the layout grows   v+1 is in memory of the new layout; v stays with its holders, and its memory is no spare

So readers never lock, copy or tear, and the lone worker pays nothing. The memory of an embedded session belongs to
the user and cannot be exchanged; there, a holder gets a copy.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, final

from torch import Tensor

from farstep_service.store.buffers import Buffers, FlatBuffers

SPARE_STEPS = 8
"""The number of steps in a row without need of the spare after which it is freed."""


@dataclass(slots=True, eq=False)
class VersionMemory:
    """Memory for one version of the parameters.

    Attributes:
        buffers: the memory.
        version: the version in it; -1 for none.
        holders: the number of readers that hold it.
    """

    buffers: Buffers
    version: int
    holders: int = 0


@final
class Held:
    """One version of the parameters, which does not change until it is released.

    Also a context manager. A forgotten one is released by garbage collection; until then every step pays for it.

    Attributes:
        version: its number.
        buffers: its memory, to be read only.
    """

    def __init__(self, version: int, memory: VersionMemory, changed: Sequence[int], versions: Versions) -> None:
        self.version = version
        self.buffers = memory.buffers
        self._changed = changed
        self._release = weakref.finalize(self, versions.drop, memory)
        self._release.atexit = False

    def span(self, first: int, last: int) -> Tensor | None:
        """Return the flat memory of the segments from `first` to before `last`, None if it is not one piece."""
        return self.buffers.span(first, last)

    def segment(self, index: int) -> Tensor:
        """Return a segment in its parameter's shape and dtype."""
        return self.buffers.segment(index)

    def changed_since(self, version: int) -> list[int]:
        """Return the segments that changed after that version, up to this one."""
        return [index for index, changed in enumerate(self._changed) if changed > version]

    def release(self) -> None:
        """Release the version; a second call does nothing."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@final
class Versions:
    """The memory of the current version, of those still held, and a spare.

    `hold`, `target`, `publish` and `grow` are called by one thread at a time, `drop` by any.

    Args:
        buffers: the first version's memory.
        version: its number.
    """

    def __init__(self, buffers: Buffers, version: int) -> None:
        self._current = VersionMemory(buffers, version)
        self._older: list[VersionMemory] = []
        self._spare: VersionMemory | None = None
        self._unneeded = 0
        self._lock = threading.Lock()

    @property
    def current(self) -> Buffers:
        """Return the memory of the current version."""
        return self._current.buffers

    @property
    def other_bytes(self) -> int:
        """Return the memory of versions still held and of the spare, without the current version's."""
        if not self._older and self._spare is None:
            return 0
        with self._lock:
            memories = self._older if self._spare is None else [*self._older, self._spare]
            return sum(each.buffers.nbytes for each in memories if isinstance(each.buffers, FlatBuffers))

    @property
    def coming_bytes(self) -> int:
        """Return the additional memory that the next version takes."""
        with self._lock:
            other = self._current.holders and self._spare is None
            return self.current.layout.nbytes if other else 0

    def hold(self, version: int, changed: Sequence[int]) -> Held:
        """Return the current version, which does not change until it is released.

        Args:
            version: its number, which is higher than its memory's if later versions did not change the parameters.
            changed: for each segment the version that last changed it; never altered afterwards.
        """
        with self._lock:
            memory = self._current
            if not isinstance(memory.buffers, FlatBuffers):
                copy = FlatBuffers(memory.buffers.layout, memory.buffers.device, zero=False).copy_(memory.buffers)
                memory = VersionMemory(copy, memory.version)
                self._older.append(memory)
            memory.holders += 1
        return Held(version, memory, changed, self)

    def drop(self, memory: VersionMemory) -> None:
        """Remove one holder; memory without holders that is not current becomes the spare."""
        with self._lock:
            memory.holders -= 1
            if not memory.holders and memory is not self._current:
                self._older.remove(memory)
                self._retire(memory)

    def target(self) -> VersionMemory:
        """Return the memory for the next version: the current one if it has no holder, else the spare or new memory."""
        with self._lock:
            if not self._current.holders:
                return self._current
            if self._spare is not None:
                return self._spare
            return VersionMemory(FlatBuffers(self.current.layout, self.current.device, zero=False), -1)

    def publish(self, memory: VersionMemory, version: int) -> None:
        """Make the memory that `target` returned the current version."""
        with self._lock:
            if memory is not self._current and self._current.version >= version:
                self._current.version = -1  # the same number with other contents: never a base to copy from
            memory.version = version
            if memory is self._current:
                self._unneeded += 1
                if self._unneeded >= SPARE_STEPS:
                    self._spare = None
                return
            self._unneeded = 0
            if memory is self._spare:
                self._spare = None
            old, self._current = self._current, memory
            if old.holders:
                self._older.append(old)
            else:
                self._retire(old)

    def grow(self, buffers: Buffers, version: int) -> None:
        """Make memory of a longer layout the current version."""
        with self._lock:
            old, self._current = self._current, VersionMemory(buffers, version)
            self._spare = None
            if old.holders:
                self._older.append(old)

    def _retire(self, memory: VersionMemory) -> None:
        """Keep unused memory as the spare, the newer of two, as less of it is out of date."""
        if memory.buffers.layout is not self.current.layout:
            return  # from before the layout grew
        if self._spare is None or self._spare.version < memory.version:
            self._spare = memory if isinstance(self.current, FlatBuffers) else None
