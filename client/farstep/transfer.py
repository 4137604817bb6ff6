"""Export a session of a server into a file, and import it into a server that does not have it.

    farstep.export_session("digits", "digits.safetensors", server="http://box:7171")
    farstep.import_session("digits.safetensors", server="http://box:7171")

The file holds one version of everything (`docs/sessions.md`); workers may push while it is written. After an import,
`optimizer.rejoin()` lets a worker whose server was restarted continue from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final
from urllib.parse import quote

import httpx

from farstep.conversation import Conversation
from farstep.conversation.replies import ReplyReader, why
from farstep.errors import Unavailable, invalid_option
from farstep.identity import NAME
from farstep.protocol.session_file import SessionFile, look_at, readable, write_whole
from farstep.protocol.tensor_file import invalid_file
from farstep.settings import resolve

PREPARE_WITHIN_S = 300.0
"""How long a server may take to copy a session before its first byte, or to create one after the last."""
READ_BYTES = 1 << 20


def export_session(
    name: str, file: str | os.PathLike[str], *, server: str | None = None, token: str | None = None, force: bool = False
) -> SessionFile:
    """Write a session into a file: one version of its parameters, state and options.

    Args:
        name: the session.
        file: the target; it appears when it is complete, readable by its owner only.
        server: the server's URL, else that of FARSTEP_SERVER.
        token: its token, else that of FARSTEP_TOKEN.
        force: replace an existing file.

    Raises:
        InvalidOption: the file exists, or cannot be written.
        FarstepError: the session does not exist or has no parameters yet, or no complete answer came.
    """
    with _speaking(server, token) as speaking:
        return save(speaking, name, Path(file), force=force)


def import_session(
    file: str | os.PathLike[str], *, name: str | None = None, server: str | None = None, token: str | None = None
) -> str:
    """Create a session from a file and return its name.

    Args:
        file: a file of `export_session`.
        name: the new session's name; by default the one in the file.
        server: the server's URL, else that of FARSTEP_SERVER.
        token: its token, else that of FARSTEP_TOKEN.

    Raises:
        InvalidFile: the file is invalid_file, foreign, or of a newer release; the server has nothing of it.
        SessionExists: the name is taken.
        FarstepError: the server has no memory for it, or no answer came.
    """
    with _speaking(server, token) as speaking:
        return load(speaking, look_at(Path(file)), name)


def save(speaking: Conversation, name: str, file: Path, *, force: bool) -> SessionFile:
    """Write a session into a file; see `export_session`.

    Raises:
        httpx.TransportError: no complete answer came; no file was written.
    """
    path = path_of_file(name)
    return write_whole(file, lambda write: speaking.download(path, write, wait_s=PREPARE_WITHIN_S), force=force)


def load(speaking: Conversation, found: SessionFile, name: str | None) -> str:
    """Create a session from a file; see `import_session`.

    Raises:
        httpx.TransportError: no answer came; whether the session was created is unknown.
    """
    name = found.name if name is None else name
    body = FileBody(found.file, found.nbytes)
    answer = speaking.upload(path_of_file(name), body, found.nbytes, wait_s=PREPARE_WITHIN_S)
    ReplyReader(answer, "The answer to the import").among("name", frozenset({name}))
    return name


def path_of_file(name: str) -> str:
    """Return the path of a session's file.

    Raises:
        InvalidOption: the name is invalid.
    """
    if not NAME.fullmatch(name):
        raise invalid_option(f"No session can be called {name!r:.80}.", field="name")
    return f"/v1/sessions/{quote(name)}/file"


@final
class FileBody(httpx.SyncByteStream):
    """Read a file as a request's body, a piece at a time."""

    def __init__(self, file: Path, nbytes: int) -> None:
        self._file = file
        self._nbytes = nbytes

    def __iter__(self) -> Iterator[bytes]:
        left = self._nbytes
        with readable(self._file), self._file.open("rb") as opened:
            while left:
                piece = opened.read(min(left, READ_BYTES))
                if not piece:
                    raise invalid_file("it became shorter while it was read", "client")
                left -= len(piece)
                yield piece


@contextmanager
def _speaking(server: str | None, token: str | None) -> Iterator[Conversation]:
    settings = resolve({"server": server, "token": token})
    if settings.server is None:
        raise invalid_option("No server is named.", remedy="Give server=... or set FARSTEP_SERVER.")
    speaking = Conversation(settings.server, settings.token)
    try:
        yield speaking
    except httpx.TransportError as exc:
        reason, remedy = why(exc)
        raise Unavailable(
            f"{settings.server} gave no complete answer: {reason}.",
            remedy=f"{remedy} An import that got no answer may have been made.",
            side="client",
        ) from exc
    finally:
        speaking.close()
