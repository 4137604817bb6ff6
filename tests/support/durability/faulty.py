"""A storage whose k-th operation fails, as a disk that is full or broken."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from farstep_service.durability.storage import Storage
from tests.support.durability.power import File, PowerStorage


@dataclass(slots=True)
class FaultyStorage(Storage):
    """Pass everything on to another storage, but for one operation.

    Args:
        inner: where to.
        error: the errno of the one that fails.
        at: which one, from 1; 0 for none.

    Attributes:
        full: whether no more files can be made.
        operations: how many there were.
        hit: the name of the one that failed; empty while none has.
    """

    inner: PowerStorage
    error: int
    at: int
    full: bool = False
    operations: int = 0
    _failed: set[File] = field(default_factory=set)
    hit: str = ""

    @property
    def boot(self) -> bytes:
        return self.inner.boot

    def create(self, name: str, nbytes: int) -> None:
        self._reach("create")
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.inner.create(name, nbytes)

    def map(self, name: str, *, writable: bool = True) -> memoryview:
        self._reach("map")
        return self.inner.map(name, writable=writable)

    def reuse(self, memory: memoryview) -> memoryview | None:
        return self.inner.reuse(memory)

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        self._reach("write")
        return self.inner.write(name, pieces)

    def sync(self, name: str) -> None:
        file = self.inner.files.get(name)
        if file in self._failed:
            raise OSError(self.error, os.strerror(self.error))
        self._reach("sync", lambda: self._lose(name))
        self.inner.sync(name)

    def sync_names(self, folder: str) -> None:
        self._reach("sync_names")
        self.inner.sync_names(folder)

    def rename(self, old: str, new: str) -> None:
        self._reach("rename")
        self.inner.rename(old, new)

    def remove(self, name: str) -> None:
        self._reach("remove")
        self.inner.remove(name)

    def names(self, folder: str) -> Sequence[str]:
        self._reach("names")
        return self.inner.names(folder)

    def size(self, name: str) -> int:
        self._reach("size")
        return self.inner.size(name)

    def free_bytes(self) -> int:
        return self.inner.free_bytes()

    def _lose(self, name: str) -> None:
        self.inner.lose(name)
        self._failed.add(self.inner.files[name])

    def _reach(self, what: str, failing: Callable[[], object] = lambda: None) -> None:
        self.operations += 1
        if self.operations == self.at:
            self.hit = what
            failing()
            raise OSError(self.error, os.strerror(self.error))
