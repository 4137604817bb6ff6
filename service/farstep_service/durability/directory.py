"""The data directory of one server: what makes a directory ours, who owns it, and the folders of its sessions.

farstep.json         {"format": 1}
owner.lock           held by the server that owns it; says which one
sessions/<id>/       one session each; the id is drawn by the server, and names nothing
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import time
from pathlib import Path
from typing import Final, final

from farstep.errors import InvalidOption
from farstep_service.durability.storage import DIRECTORY_MODE, FILE_MODE, DiskStorage
from farstep_service.failpoints import reached

FORMAT: Final = 1
MARKER: Final = "farstep.json"
LOCK: Final = "owner.lock"
SESSIONS: Final = "sessions"
REMOVED: Final = ".removed"
TRIES: Final = 10
TRY_EVERY_S: Final = 0.1
"""A server that was killed holds its lock for a moment longer: as long as children that it was starting."""
NEW: Final = ".new"
"""The end of the name of a folder that is not complete yet."""


@final
class DataDirectory:
    """A data directory that this process owns until it closes it or ends.

    Args:
        path: the directory; made if it is not there.
        owner: how the refusal of another server names this one.

    Attributes:
        storage: its files.

    Raises:
        InvalidOption: it is not ours, of a newer format, owned by another server, or cannot be written.
    """

    def __init__(self, path: str, owner: str) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            self._check()
            self._lock = self._locked(owner)
            try:
                self._mark()
            except OSError:
                os.close(self._lock)
                raise
        except OSError as exc:
            raise _refused(f"{path} cannot be used ({exc.strerror})", "Give a directory that can be written.") from exc
        self.storage = DiskStorage(self.path)
        for name in self.storage.names(SESSIONS):
            folder = f"{SESSIONS}/{name}"
            if name.endswith((REMOVED, NEW)) or self._was_never_there(folder):
                self.storage.remove(folder)

    def folders(self) -> list[str]:
        """Return the folders of its sessions, those that are complete."""
        return [f"{SESSIONS}/{name}" for name in self.storage.names(SESSIONS) if not name.endswith((REMOVED, NEW))]

    def new_folder(self) -> str:
        """Return a name for the folder of a new session."""
        return f"{SESSIONS}/{secrets.token_hex(16)}"

    def remove(self, folder: str) -> None:
        """Remove a session's folder: it is gone at once, and its files are deleted then."""
        reached("directory.remove.before")
        self.storage.rename(folder, folder + REMOVED)
        self.storage.sync_names(SESSIONS)
        reached("directory.remove.renamed")
        self.storage.remove(folder + REMOVED)

    def close(self) -> None:
        """Give the directory up."""
        self.storage.close()
        os.close(self._lock)

    def _was_never_there(self, folder: str) -> bool:
        """Return whether a process ended while it made a session, of which the first manifest comes last."""
        names = [name.partition(".") for name in self.storage.names(folder)]
        return all(int(stem) == 1 and ending != "json" for stem, _, ending in names if stem.isdecimal())

    def _check(self) -> None:
        """Refuse a directory with anything in it that is not ours."""
        names = {each.name: each for each in os.scandir(self.path)}
        marker = names.get(MARKER)
        if marker is None:
            begun = {f"{MARKER}.part"}  # of a start that did not come to its end
            if SESSIONS in names and not names[SESSIONS].is_symlink() and not os.listdir(names[SESSIONS]):
                begun.add(SESSIONS)
            foreign = sorted(names.keys() - {LOCK, "lost+found"} - begun)
            if foreign:
                raise _refused(
                    f"{self.path} is not a data directory of farstep, and holds {foreign[0]!r:.80}",
                    "Give an empty directory, or one that a farstep server made.",
                )
            return
        for name in (MARKER, SESSIONS, LOCK):
            if name in names and names[name].is_symlink():
                raise _refused(f"{self.path / name} is a symbolic link", "Put the files themselves there.")
        try:
            said = json.loads((self.path / MARKER).read_text())["format"]
        except (ValueError, KeyError, TypeError):
            raise _refused(f"{self.path / MARKER} cannot be read", "Restore it from a backup.") from None
        if type(said) is not int or said > FORMAT:
            raise _refused(
                f"{self.path} has the format {said!r:.20}, and this release reads up to {FORMAT}",
                "Use the release that wrote it, or a newer one.",
            )
        for entry in os.scandir(self.path / SESSIONS) if SESSIONS in names else ():
            if entry.is_symlink() or not stat.S_ISDIR(entry.stat(follow_symlinks=False).st_mode):
                raise _refused(f"{entry.path} is not a folder", "Remove it.")

    def _locked(self, owner: str) -> int:
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, FILE_MODE)
        if not _taken(lock):
            there = os.read(lock, 200).decode(errors="replace").strip() or "another server"
            os.close(lock)
            raise _refused(f"{self.path} is owned by {there}", "Stop that server, or give another directory.") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{owner}\n".encode(), 0)
        return lock

    def _mark(self) -> None:
        if (self.path / MARKER).exists():
            return
        (self.path / SESSIONS).mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        part = self.path / f"{MARKER}.part"
        with open(part, "w") as file:
            json.dump({"format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path / MARKER)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _taken(lock: int) -> bool:
    """Take a lock and return whether it was free; one whose owner is just ending is waited for."""
    for left in reversed(range(TRIES)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if left:
                time.sleep(TRY_EVERY_S)
    return False


def _refused(what: str, remedy: str) -> InvalidOption:
    return InvalidOption(f"Invalid data_dir: {what}.", remedy=remedy, field="data_dir")
