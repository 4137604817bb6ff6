"""Session files on this machine (`docs/sessions.md`): their description, and how they are written.

A file appears under its name when all of it is on the disk, and only its owner may read it: it contains the model.
Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farstep.errors import InvalidFile, InvalidOption, Side, invalid_option
from farstep.protocol.tensor_file import LENGTH_BYTES, head_length, invalid_file, read_head

FORMAT = "farstep_format"
FORMAT_VERSION = "1"
DESCRIPTION = "farstep_session"


@dataclass(frozen=True, slots=True)
class SessionFile:
    """The description of a session file.

    Attributes:
        file: its path.
        name: the session's name at the export.
        optimizer: torch's class name.
        version: the session's version.
        parameters: the number of parameters.
        nbytes: the size of the file.
    """

    file: Path
    name: str
    optimizer: str
    version: int
    parameters: int
    nbytes: int


def description_in(metadata: Mapping[str, str], *, side: Side = "server") -> dict[str, Any]:
    """Return the unchecked description of a session in a file's metadata.

    Raises:
        InvalidFile: it is another kind of safetensors file, or has a format of a newer release.
    """
    version = metadata.get(FORMAT)
    if version is None or DESCRIPTION not in metadata:
        raise invalid_file("it is a safetensors file, but no farstep session", side)
    if version != FORMAT_VERSION:
        raise InvalidFile(
            f"This session file has the format {version!r:.40}; this release reads {FORMAT_VERSION}.",
            remedy="Bring the server and the command line to a release that reads it.",
            field=FORMAT,
            limit=FORMAT_VERSION,
            side=side,
        )
    try:
        description = json.loads(metadata[DESCRIPTION])
    except (ValueError, RecursionError) as exc:
        raise invalid_file(f"its session cannot be read: {exc!s:.200}", side) from None
    if not isinstance(description, dict):
        raise invalid_file("its session is no JSON object", side)
    return description


def look_at(file: Path) -> SessionFile:
    """Read the head of a session file.

    Raises:
        InvalidFile: it is not a session file, or incomplete.
        InvalidOption: it cannot be read.
    """
    with readable(file), file.open("rb") as opened:
        nbytes = os.fstat(opened.fileno()).st_size
        length = head_length(opened.read(LENGTH_BYTES), nbytes, side="client")
        head = read_head(opened.read(length), nbytes - LENGTH_BYTES - length, side="client")
    said = description_in(head.metadata, side="client")
    segments = said.get("segments")
    found = [said.get("name"), said.get("optimizer"), said.get("version"), segments]
    if [type(each) for each in found] != [str, str, int, list]:
        raise invalid_file("its session has no name, optimizer, version or segments", "client")
    return SessionFile(file, said["name"], said["optimizer"], said["version"], len(said["segments"]), nbytes)


def write_whole(file: Path, fill: Callable[[Callable[[memoryview], object]], object], *, force: bool) -> SessionFile:
    """Write a session file: completely, or not at all.

    Args:
        file: its path.
        fill: given a function that writes bytes, writes the file.
        force: replace an existing file.

    Raises:
        InvalidOption: the file exists and `force` is not given, or it cannot be written.
        InvalidFile: the bytes written are not a session file; they were removed.
    """
    if not force and os.path.lexists(file):
        raise _there(file)
    with _writable(file):
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name[:100]}.", suffix=".part")
    try:
        with _writable(file), open(handle, "wb") as opened:
            fill(opened.write)
            opened.flush()
            os.fsync(opened.fileno())
        found = look_at(Path(temporary))
        with _writable(file):
            _put(temporary, file, force)
        return SessionFile(file, found.name, found.optimizer, found.version, found.parameters, found.nbytes)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _put(temporary: str, file: Path, force: bool) -> None:
    """Give a complete file its name, and make that durable."""
    if force:
        os.replace(temporary, file)
    else:
        try:
            os.link(temporary, file)  # unlike a rename, a link replaces no file
        except OSError:
            if os.path.lexists(file):
                raise _there(file) from None
            os.replace(temporary, file)  # a file system without links
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _there(file: Path) -> InvalidOption:
    return invalid_option(f"{file} is there already.", remedy="Choose another name, or --force.", field="file")


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Translate system errors of reading a file."""
    try:
        yield
    except OSError as exc:
        raise invalid_option(f"Cannot read {file}: {exc.strerror}.", field="file") from exc


@contextmanager
def _writable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise invalid_option(f"Cannot write {file}: {exc.strerror}.", field="file") from exc
