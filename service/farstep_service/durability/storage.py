"""The files below one directory, and the few operations by which anything is done to them.

    create(name, nbytes)   a new file of zeros, whose blocks are taken from the disk: writing to it cannot fail for room
    map(name)              its bytes as memory; what is written there survives the process, and a power loss once synced
    write(name, pieces)    a new file, whole
    sync(name)             what the file holds is on the disk when this returns
    sync_names(folder)     which files there are, under which names, is on the disk when this returns
    rename, remove, names  as of a file system; a rename replaces

Names are relative, `sessions/x/000001.journal`; no other module opens a file of a data directory. Tests give another
storage, which keeps only what was synced, or fails at the k-th operation.

A sync that failed once is final for its file: the kernel may have dropped the pages that it could not write, and a
second call would say that all is well.
"""

from __future__ import annotations

import mmap
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, final

DIRECTORY: Final = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700


class Storage(ABC):
    """Files below one directory."""

    @abstractmethod
    def create(self, name: str, nbytes: int) -> None:
        """Make a file of zeros, and the folders it is in.

        Raises:
            OSError: there is no room for it, or such a file is there; then nothing has changed.
        """

    @abstractmethod
    def map(self, name: str, *, writable: bool = True) -> memoryview:
        """Return the bytes of a file as memory, for as long as the memory is referred to."""

    @abstractmethod
    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        """Make a file of some pieces, and return its size.

        Raises:
            OSError: it could not be written whole; then it is not there.
        """

    @abstractmethod
    def sync(self, name: str) -> None:
        """Bring what a file holds to the disk.

        Raises:
            OSError: that failed, now or at an earlier call.
        """

    @abstractmethod
    def sync_names(self, folder: str) -> None:
        """Bring the names in a folder to the disk: files that were made, renamed or removed there.

        Raises:
            OSError: that failed.
        """

    @abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Give a file another name; a file that has it is replaced."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; one that is not there is no error."""

    @abstractmethod
    def names(self, folder: str) -> Sequence[str]:
        """Return the names of the files and folders in a folder, sorted; none if it is not there."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of a file.

        Raises:
            FileNotFoundError: it is not there.
        """

    @abstractmethod
    def free_bytes(self) -> int:
        """Return how many bytes there is room for."""


@final
class DiskStorage(Storage):
    """Files of this machine.

    Args:
        root: the directory, which is there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, int] = {}
        self._failed: dict[str, OSError] = {}

    def create(self, name: str, nbytes: int) -> None:
        path = self._path(name)
        path.parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, FILE_MODE)
        try:
            _allocate(descriptor, nbytes)
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        self._open[name] = descriptor

    def map(self, name: str, *, writable: bool = True) -> memoryview:
        descriptor = self._descriptor(name)
        size = os.fstat(descriptor).st_size
        if not size:
            return memoryview(b"")
        return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ))

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        path = self._path(name)
        path.parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, FILE_MODE)
        written = 0
        try:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while view:
                    count = os.write(descriptor, view)
                    written += count
                    view = view[count:]
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        self._close(name)
        self._open[name] = descriptor
        return written

    def sync(self, name: str) -> None:
        if name in self._failed:
            raise self._failed[name]
        try:
            os.fdatasync(self._descriptor(name))
        except OSError as exc:
            self._failed[name] = exc
            raise

    def sync_names(self, folder: str) -> None:
        descriptor = os.open(self._path(folder), DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: str, new: str) -> None:
        self._path(new).parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        os.replace(self._path(old), self._path(new))
        self._close(new)
        for kept in (self._open, self._failed):
            if old in kept:
                kept[new] = kept.pop(old)  # type: ignore[assignment]  # each of its own kind

    def remove(self, name: str) -> None:
        path = self._path(name)
        if path.is_dir() and not path.is_symlink():
            for each in [*self._open]:
                if each.startswith(f"{name}/"):
                    self._close(each)
            shutil.rmtree(path)
            return
        path.unlink(missing_ok=True)
        self._close(name)

    def names(self, folder: str) -> Sequence[str]:
        try:
            return sorted(os.listdir(self._path(folder)))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        return self._path(name).stat().st_size

    def free_bytes(self) -> int:
        found = os.statvfs(self._root)
        return found.f_bavail * found.f_frsize

    def close(self) -> None:
        """Close every file; memory that is still referred to stays."""
        for name in [*self._open]:
            self._close(name)

    def _path(self, name: str) -> Path:
        return self._root / name

    def _descriptor(self, name: str) -> int:
        found = self._open.get(name)
        if found is None:
            found = self._open[name] = os.open(self._path(name), os.O_RDWR | os.O_NOFOLLOW)
        return found

    def _close(self, name: str) -> None:
        self._failed.pop(name, None)
        descriptor = self._open.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)


def _allocate(descriptor: int, nbytes: int) -> None:
    """Take blocks for a file from the disk; where the file system has no call for it, by writing zeros."""
    if not nbytes:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
        return
    zeros = memoryview(bytes(1 << 20))
    left = nbytes
    while left:
        left -= os.write(descriptor, zeros[: min(left, len(zeros))])
