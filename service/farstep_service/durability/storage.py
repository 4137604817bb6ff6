"""The files below one directory, and the few operations by which anything is done to them.

    create(name, nbytes)   a new file of zeros, whose blocks are taken from the disk: writing to it cannot fail for room
    map(name)              its bytes as memory; what is written there survives the process, and a power loss once synced
    reuse(memory)          that memory again, if nothing else refers to it
    write(name, pieces)    a new file, whole
    sync(name)             what the file holds, and its size, are on the disk when this returns
    sync_names(folder)     which files there are, under which names, is on the disk when this returns
    rename, remove, names  as of a file system; a rename replaces

Names are relative, `sessions/x/000001.journal`; no other module opens a file of a data directory. Tests give another
storage, which keeps only what was synced, or fails at the k-th operation.

A sync that failed once is final for its file: the kernel may have dropped the pages that it could not write, and a
second call would succeed without them.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar, final

DIRECTORY: Final = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700
Of = TypeVar("Of")
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Storage(ABC):
    """Files below one directory."""

    @property
    @abstractmethod
    def boot(self) -> bytes:
        """Return what is another one once the machine has lost its memory; empty if that cannot be known."""

    @abstractmethod
    def create(self, name: str, nbytes: int) -> None:
        """Make a file of zeros, and the folders it is in; the names of these are on the disk at once.

        Raises:
            OSError: there is no room for it, or such a file is there; then nothing has changed.
        """

    @abstractmethod
    def map(self, name: str, *, writable: bool = True) -> memoryview:
        """Return the bytes of a file as memory, for as long as the memory is referred to.

        Args:
            writable: what is written there goes to the file; otherwise it stays with this memory.
        """

    @abstractmethod
    def reuse(self, memory: memoryview) -> memoryview | None:
        """Release what `map` returned; return it anew if nothing else refers to that memory: no slice of it.

        A tensor counts if it was made of a slice. One made of the memory itself does not: torch refers to the
        `memoryview` that it is given, which is released here.
        """

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
        """Give a file, or a folder with all that is in it, another name; a file that has it is replaced."""

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
    """Files of this machine. Any thread may use it, each file one thread at a time but for `sync`.

    A symbolic link below the directory is not followed: anyone who may write there could choose what the server reads
    and overwrites.

    Args:
        root: the directory, which is there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._boot = _boot_id()
        self._lock = threading.Lock()  # of the two tables, not of the files
        self._open: dict[str, int] = {}
        self._failed: dict[str, OSError] = {}
        self._once: set[str] = set()  # files that are synced once, and not open any more then

    @property
    def boot(self) -> bytes:
        return self._boot

    def create(self, name: str, nbytes: int) -> None:
        path = self._path(name)
        self._make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        try:
            _allocate(descriptor, nbytes)
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        self._keep(name, descriptor)

    def map(self, name: str, *, writable: bool = True) -> memoryview:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._path(name), flags)
        try:
            size = os.fstat(descriptor).st_size
            if not size:
                return memoryview(b"")
            return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY))
        finally:
            os.close(descriptor)

    def reuse(self, memory: memoryview) -> memoryview | None:
        mapping = memory.obj
        memory.release()
        if not isinstance(mapping, mmap.mmap):  # an empty file
            return memoryview(b"")
        try:
            mapping.resize(len(mapping))  # changes nothing, and fails if another view, an array or a tensor is there
        except (BufferError, SystemError):  # SystemError: this system cannot resize
            return None
        return memoryview(mapping)

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        path = self._path(name)
        self._make_folder(path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, FILE_MODE)
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
            self._close(name)
            raise
        self._close(name)
        self._keep(name, descriptor)
        self._once.add(name)
        return written

    def sync(self, name: str) -> None:
        if (failed := self._failed.get(name)) is not None:
            raise failed.with_traceback(None)
        try:
            os.fdatasync(self._descriptor(name))
        except OSError as exc:
            with self._lock:
                self._failed[name] = exc
            raise
        if name in self._once:
            self._once.discard(name)
            self._close(name)

    def sync_names(self, folder: str) -> None:
        _sync_directory(self._path(folder))

    def rename(self, old: str, new: str) -> None:
        path = self._path(new)
        self._make_folder(path.parent)
        os.replace(self._path(old), path)
        self._close(new)
        with self._lock:
            _rename_in(self._open, old, new)
            _rename_in(self._failed, old, new)

    def remove(self, name: str) -> None:
        path = self._path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        for each in [*self._open]:
            if each == name or each.startswith(f"{name}/"):
                self._close(each)

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
        """Return where a file is.

        Raises:
            OSError: it, or a folder it is in, is a symbolic link, or the name leads out of the directory.
        """
        path = self._root
        for part in name.split("/"):
            path = path / part
            if part in ("", ".", "..") or _is_link(path):
                raise OSError(errno.ELOOP, "A data directory has no symbolic links and no paths out of it", str(path))
        return path

    def _make_folder(self, path: Path) -> None:
        """Make a folder and those it is in, with names that survive a power loss."""
        if path.is_dir():
            return
        self._make_folder(path.parent)
        path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        _sync_directory(path.parent)

    def _descriptor(self, name: str) -> int:
        with self._lock:
            found = self._open.get(name)
            if found is None:
                flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
                found = self._open[name] = os.open(self._path(name), flags)
            return found

    def _keep(self, name: str, descriptor: int) -> None:
        with self._lock:
            self._open[name] = descriptor

    def _close(self, name: str) -> None:
        with self._lock:
            self._failed.pop(name, None)
            descriptor = self._open.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)


def _rename_in(table: dict[str, Of], old: str, new: str) -> None:
    """Move what a table has of a file, or of all files in a folder, to another name."""
    for name in [name for name in table if name == old or name.startswith(f"{old}/")]:
        table[new + name.removeprefix(old)] = table.pop(name)


def _is_link(path: Path) -> bool:
    try:
        return stat.S_ISLNK(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _boot_id() -> bytes:
    """Return the kernel's name for the time since it was started, empty where it has none."""
    try:
        return BOOT_ID.read_bytes().strip() if sys.platform == "linux" else b""
    except OSError:
        return b""


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
