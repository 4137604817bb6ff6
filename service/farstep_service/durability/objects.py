"""Stores elsewhere: a bucket of an object store, or a folder of another disk.

    put(name, pieces)   an object, whole or not at all; one of that name is replaced
    get(name)           its bytes, in pieces
    names(folder)       the names of the objects in a folder, sorted
    folders()           the names of the folders, sorted
    remove(name)        one that is not there is no error

    file:///backups/farstep               a folder                        needs nothing more
    s3://bucket/path, gs://, az://        an object store                 needs `farstep[archive]`

A store is named by the server's own settings, never by a client. Who may use it, and where it is, comes from the
variables of its vendor: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME ...
Whatever goes wrong with a store is an `OSError`.
"""

from __future__ import annotations

import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, final
from urllib.parse import unquote, urlsplit

from farstep.errors import InvalidOption

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Piece = bytes | memoryview

PIECE_BYTES: Final = 8 << 20
"""Bytes that are read or sent at a time."""
CONNECT_S: Final = 5.0
ANSWER_S: Final = 60.0
RETRIES: Final = 2
RETRY_S: Final = 15.0
"""Seconds after which a request is not tried again; the next snapshot tries anew."""
CLOUDS: Final = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_PART: Final = ".part"


class Objects(ABC):
    """Objects below one URL. Names are relative, `folder/object`; any thread may use it."""

    @abstractmethod
    def put(self, name: str, pieces: Iterable[Piece]) -> None:
        """Make an object of some pieces. If one of them cannot be had, its error is raised, and there is no object.

        Raises:
            OSError: the store did not take it; one of that name is what it was.
        """

    @abstractmethod
    def get(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of an object.

        Raises:
            FileNotFoundError: it is not there.
            OSError: the store did not give it.
        """

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Return the names of the objects in a folder, without the folder, sorted."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Return the names of the folders that hold objects, sorted."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""

    def read(self, name: str) -> bytes:
        """Return the bytes of a small object."""
        return b"".join(self.get(name))


@final
class FolderObjects(Objects):
    """Objects as files below a folder, each written under another name, synced and renamed.

    Args:
        root: the folder; made when something is put there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, name: str, pieces: Iterable[Piece]) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PART}")
        try:
            with part.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def get(self, name: str) -> Iterator[bytes]:
        with self._path(name).open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    def names(self, folder: str) -> list[str]:
        try:
            found = [each.name for each in os.scandir(self._path(folder)) if each.is_file()]
        except FileNotFoundError:
            return []
        return sorted(each for each in found if not each.endswith(_PART))

    def folders(self) -> list[str]:
        try:
            return sorted(each.name for each in os.scandir(self._root) if each.is_dir() and _NAME.fullmatch(each.name))
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._root / checked(name)


@final
class CloudObjects(Objects):
    """Objects of an object store.

    Args:
        url: the bucket and a path in it.

    Raises:
        InvalidOption: the package that speaks with it is missing, or it lacks a setting.
    """

    def __init__(self, url: str) -> None:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ModuleNotFoundError as exc:
            raise refused(
                f"{urlsplit(url).scheme}:// needs a package that is not installed ({exc.name})",
                "Install it beside the server, `pip install 'farstep[archive]'`, or give file:///a/folder.",
            ) from exc
        self._errors: tuple[type[Exception], ...] = (BaseError,)
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "") or os.environ.get("AWS_ENDPOINT", "")
        try:
            self._store: ObjectStore = from_url(
                url,
                client_options={
                    "connect_timeout": timedelta(seconds=CONNECT_S),
                    "timeout": timedelta(seconds=ANSWER_S),
                    "allow_http": endpoint.startswith("http://"),
                },
                retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)},
            )
        except (BaseError, ValueError) as exc:
            raise refused(
                f"{url} cannot be used ({first_line(exc)})", "Set the variables that its vendor's tools read."
            ) from exc

    def put(self, name: str, pieces: Iterable[Piece]) -> None:
        with self._translated():
            self._store.put(checked(name), map(bytes, pieces), chunk_size=PIECE_BYTES, max_concurrency=2)

    def get(self, name: str) -> Iterator[bytes]:
        with self._translated():
            for piece in self._store.get(checked(name)).stream(PIECE_BYTES):
                yield bytes(piece)

    def names(self, folder: str) -> list[str]:
        with self._translated():
            found = [each["path"] for page in self._store.list(f"{checked(folder)}/") for each in page]
        return sorted(each.rpartition("/")[2] for each in found)

    def folders(self) -> list[str]:
        with self._translated():
            return sorted(each.rpartition("/")[2] for each in self._store.list_with_delimiter()["common_prefixes"])

    def remove(self, name: str) -> None:
        with self._translated():
            try:
                self._store.delete(checked(name))
            except FileNotFoundError:
                return

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._errors as exc:
            raise OSError(None, first_line(exc)) from exc


def open_objects(url: str) -> Objects:
    """Return the store at a URL; whether it answers is found out when it is used.

    Raises:
        InvalidOption: it is no such URL, or a package for it is missing.
    """
    check_url(url)
    found = urlsplit(url)
    if found.scheme == "file":
        return FolderObjects(Path(unquote(found.path)))
    return CloudObjects(url.rstrip("/"))


def check_url(url: str) -> None:
    """Refuse what is no URL of a store.

    Raises:
        InvalidOption: saying why, without what may be a secret in it.
    """
    try:
        found = urlsplit(url)
        secret = "@" in found.netloc or bool(found.query) or bool(found.fragment)
    except ValueError as exc:
        raise refused("it is not a URL", "Give s3://BUCKET/PATH or file:///FOLDER.") from exc
    if secret:
        raise refused(
            "a URL with a user, a question mark or a fragment may hold a secret, and is shown in logs",
            "Put credentials into the variables that the store's vendor names.",
        )
    if found.scheme not in ("file", *CLOUDS):
        known = ", ".join(f"{each}://" for each in ("file", *CLOUDS))
        raise refused(f"{url!r:.80} has a scheme that is not known here", f"Give one of {known}.")
    if found.scheme == "file" and (found.netloc or not found.path.strip("/")):
        raise refused(f"{url!r:.80} names no folder", "Write file:///FOLDER, with three slashes.")
    if found.scheme != "file" and not found.netloc:
        raise refused(f"{url!r:.80} names no bucket", f"Write {found.scheme}://BUCKET/PATH.")


def checked(name: str) -> str:
    """Return a name that leads nowhere else.

    Raises:
        OSError: it is another one.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise OSError(None, f"{name!r:.80} is no name of an object")
    return name


def first_line(exc: Exception) -> str:
    """Return what an error of a store says, without what it repeats for those who debug it."""
    return str(exc).strip().partition("\n")[0][:300] or type(exc).__name__


def refused(what: str, remedy: str) -> InvalidOption:
    """Return the error for a URL that is not one of a store."""
    return InvalidOption(f"Invalid archive: {what}.", remedy=remedy, field="archive")
