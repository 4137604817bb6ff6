"""Requests of a verb to a server: the URL, the token, and errors when it does not answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

import typer

from farstep.errors import FarstepError, InvalidAnswer, Unavailable, invalid_option
from farstep.protocol.unix import url_of_path
from farstep_service.settings import DEFAULT_PORT

if TYPE_CHECKING:
    from farstep.conversation import Conversation

READ_TIMEOUT_S = 10.0
SESSIONS_PAGE = 100
MEMBERS_PAGE = 500
"""Sessions, and workers or param groups, of one request: as many as a server gives at once."""
MOST_SESSIONS = 100_000
"""A server that has still another page after these is not a farstep server."""
LISTING_BYTES = 16 << 20
"""The largest list of sessions, or of one session's workers."""
INFO: Mapping[str, type] = {
    "farstep": str,
    "device": str,
    "optimizers": list,
    "sessions": int,
    "parameter_bytes": int,
    "authentication": bool,
}
SESSION: Mapping[str, type] = {
    "name": str,
    "incarnation": str,
    "version": int,
    "initialised": bool,
    "optimizer": str,
    "groups": list,
    "consistency": dict,
    "nonfinite": str,
    "kernel": str,
    "parameters": int,
    "segments": int,
    "bytes": dict,
    "workers": dict,
}
WORKER: Mapping[str, type] = {"epoch": int, "sequence": int, "waiting": bool, "live": bool}
"""Members of the server's documents that verbs print."""


def local_server() -> str:
    """Return the URL of the server that `farstep serve` starts on this machine in this environment."""
    if path := os.environ.get("FARSTEP_SERVE_UNIX"):
        return url_of_path(path)
    return f"http://127.0.0.1:{os.environ.get('FARSTEP_SERVE_PORT') or DEFAULT_PORT}"


Server = Annotated[
    str, typer.Option(default_factory=local_server, envvar="FARSTEP_SERVER", metavar="URL", help="The server.")
]
Token = Annotated[
    str | None,
    typer.Option(envvar="FARSTEP_TOKEN", metavar="TOKEN", help="Its token; the variable hides it from other users."),
]


@contextmanager
def open_conversation(server: str, token: str | None, read_timeout_s: float = READ_TIMEOUT_S) -> Iterator[Conversation]:
    """Open a conversation with a server and close it; translate errors of the transport.

    Args:
        server, token: where, and with what.
        read_timeout_s: how long the server may be silent.

    Raises:
        InvalidOption: the URL is invalid.
        Unavailable: the server does not answer.
        InvalidAnswer: the answer is not a farstep server's.
        FarstepError: the server's error.
    """
    import httpx

    from farstep.conversation import Conversation
    from farstep.conversation.replies import why
    from farstep.errors.connecting import without_secrets
    from farstep.settings import resolve

    conversation = None
    try:
        server = resolve({"server": server}, environment={}).server or server
        conversation = Conversation(server, token and token.strip(), read_timeout_s=read_timeout_s)
        yield conversation
    except FarstepError:
        raise
    except httpx.TransportError as exc:
        cause = exc.__cause__
        reason, remedy = why(exc)
        if isinstance(cause, ConnectionError) and cause.strerror:
            reason = cause.strerror
        raise Unavailable(
            f"{without_secrets(server)} does not answer: {reason.rstrip('.')}.", remedy=remedy, side="client"
        ) from exc
    except (httpx.InvalidURL, ValueError) as exc:
        raise invalid_option(f"The URL {without_secrets(server)!r} or the token cannot be used.") from exc
    finally:
        if conversation is not None:
            conversation.close()


def document_of(conversation: Conversation, path: str, known_by: str) -> dict[str, Any]:
    """Return the document at a path of the server, which has the key `known_by`.

    Raises:
        InvalidAnswer: the answer is not a farstep server's.
    """
    answer: object = conversation.control("GET", path, largest=LISTING_BYTES)
    if not isinstance(answer, dict) or known_by not in answer or not _whole(answer):
        raise not_a_server(conversation.server)
    return answer


def sessions_of(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the server's document of each of its sessions, page by page.

    Raises:
        InvalidAnswer: the answer is not a farstep server's.
    """
    found: dict[str, dict[str, Any]] = {}
    after = ""
    while True:
        query = urlencode({"after": after, "limit": SESSIONS_PAGE})
        page: object = conversation.control("GET", f"/v1/sessions?{query}", largest=LISTING_BYTES)
        if not isinstance(page, list) or not all(isinstance(each, dict) and _whole(each) for each in page):
            raise not_a_server(conversation.server)
        new = {each["name"]: each for each in page if each["name"] not in found}
        found |= new
        if not new or len(page) != SESSIONS_PAGE or len(found) > MOST_SESSIONS:  # an old server has no pages
            return list(found.values())
        after = page[-1]["name"]


def session_of(conversation: Conversation, path: str) -> dict[str, Any]:
    """Return the server's document of one session, with all of its workers and param groups.

    Raises:
        InvalidAnswer: the answer is not a farstep server's.
    """
    found = document_of(conversation, path, "version")
    workers, groups = found["workers"], found["groups"]
    while workers and len(workers) < found.get("worker_count", 0):
        query = urlencode({"after": max(workers), "limit": MEMBERS_PAGE})
        page: object = conversation.control("GET", f"{path}/workers?{query}", largest=LISTING_BYTES)
        if not isinstance(page, dict) or not _are_workers(page):
            raise not_a_server(conversation.server)
        if page.keys() <= workers.keys():
            break  # some have left meanwhile
        workers |= page
    while len(groups) < found.get("group_count", 0):
        query = urlencode({"after": len(groups) - 1, "limit": MEMBERS_PAGE})
        more = conversation.control("GET", f"{path}/groups?{query}", largest=LISTING_BYTES).get("groups")
        if not isinstance(more, list) or not all(isinstance(each, dict) for each in more):
            raise not_a_server(conversation.server)
        if not more:
            break
        groups += more
    return found


def _whole(document: dict[str, Any]) -> bool:
    """Return whether the document of a server or session has the members that verbs print, with their types."""
    needed = SESSION if "incarnation" in document else INFO
    if not all(isinstance(document.get(key), kind) for key, kind in needed.items()):
        return False
    if needed is INFO:
        return True
    numbers = all(type(each) is int for each in document["bytes"].values())
    groups = all(isinstance(each, dict) for each in document["groups"])
    counts = all(type(document.get(key, 0)) is int for key in ("worker_count", "group_count"))
    return numbers and groups and counts and _are_workers(document["workers"])


def _are_workers(pages: dict[str, Any]) -> bool:
    return all(
        isinstance(each, dict) and all(isinstance(each.get(key), kind) for key, kind in WORKER.items())
        for each in pages.values()
    )


def not_a_server(server: str) -> InvalidAnswer:
    """Return the error for an answer that is not a farstep server's."""
    return InvalidAnswer(
        f"{server} does not answer as a farstep server does.", remedy="Check the URL and its port.", side="client"
    )
