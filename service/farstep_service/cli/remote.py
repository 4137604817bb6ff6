"""How a verb asks a server: which one, with which token, and what to say when it does not answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

import typer

from farstep.errors import FarstepError, InvalidOption, InvalidRequest, Unavailable
from farstep.unix import url_of_path
from farstep_service.settings import DEFAULT_PORT

if TYPE_CHECKING:
    from farstep.conversation import Conversation

READ_TIMEOUT_S = 10.0
SESSIONS_PAGE = 100
MEMBERS_PAGE = 500
"""How many sessions, and workers or param groups, are asked for at once: as many as a server gives."""


def own_server() -> str:
    """Return the URL of the server that `farstep serve` starts on this machine in this environment."""
    if path := os.environ.get("FARSTEP_SERVE_UNIX"):
        return url_of_path(path)
    return f"http://127.0.0.1:{os.environ.get('FARSTEP_SERVE_PORT') or DEFAULT_PORT}"


Server = Annotated[
    str, typer.Option(default_factory=own_server, envvar="FARSTEP_SERVER", metavar="URL", help="Which server.")
]
Token = Annotated[
    str | None,
    typer.Option(envvar="FARSTEP_TOKEN", metavar="TOKEN", help="Its token; in the variable nobody else sees it."),
]


@contextmanager
def conversation(server: str, token: str | None) -> Iterator[Conversation]:
    """Open a conversation with a server and close it, translating what goes wrong below.

    Raises:
        InvalidOption: the URL is none.
        Unavailable: no answer came.
        InvalidRequest: the answer is not a farstep server's.
        FarstepError: what the server answered.
    """
    import httpx

    from farstep.conversation import Conversation
    from farstep.settings import resolve

    speaking = None
    try:
        server = resolve({"server": server}, environment={}).server or server
        speaking = Conversation(server, token and token.strip(), read_timeout_s=READ_TIMEOUT_S)
        yield speaking
    except FarstepError:
        raise
    except httpx.TransportError as exc:
        cause = exc.__cause__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(exc) or type(exc).__name__
        raise Unavailable(
            f"{server} does not answer: {reason.rstrip('.')}.",
            remedy="Check the URL, and that `farstep serve` runs there.",
            side="client",
        ) from exc
    except (json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise not_a_server(server) from exc
    except (httpx.InvalidURL, ValueError) as exc:
        raise InvalidOption(f"The URL {server!r:.200} or the token cannot be used: {exc}.", side="client") from exc
    finally:
        if speaking is not None:
            speaking.close()


def document_of(speaking: Conversation, path: str, known_by: str) -> dict[str, Any]:
    """Return a document that the server has at a path and that has the key `known_by`.

    Raises:
        InvalidRequest: the answer is not a farstep server's.
    """
    answer: object = speaking.control("GET", path)
    if not isinstance(answer, dict) or known_by not in answer:
        raise not_a_server(speaking.server)
    return answer


def sessions_of(speaking: Conversation) -> list[dict[str, Any]]:
    """Return what the server says about each of its sessions, asking for one page after the other.

    Raises:
        InvalidRequest: the answer is not a farstep server's.
    """
    found: dict[str, dict[str, Any]] = {}
    after = ""
    while True:
        page: object = speaking.control("GET", f"/v1/sessions?{urlencode({'after': after, 'limit': SESSIONS_PAGE})}")
        if not isinstance(page, list) or not all(isinstance(each, dict) and "name" in each for each in page):
            raise not_a_server(speaking.server)
        new = {each["name"]: each for each in page if each["name"] not in found}
        found |= new
        if not new or len(page) != SESSIONS_PAGE:  # a server that knows no pages answers with all
            return list(found.values())
        after = page[-1]["name"]


def session_of(speaking: Conversation, path: str) -> dict[str, Any]:
    """Return what the server says about one session, with all of its workers and param groups.

    Raises:
        InvalidRequest: the answer is not a farstep server's.
    """
    found = document_of(speaking, path, "version")
    while len(found["workers"]) < found.get("worker_count", 0):
        query = urlencode({"after": max(found["workers"]), "limit": MEMBERS_PAGE})
        page = speaking.control("GET", f"{path}/workers?{query}")
        if not page:
            break  # some have left meanwhile
        found["workers"] |= page
    while len(found["groups"]) < found.get("group_count", 0):
        query = urlencode({"after": len(found["groups"]) - 1, "limit": MEMBERS_PAGE})
        groups = speaking.control("GET", f"{path}/groups?{query}").get("groups")
        if not groups:
            break
        found["groups"] += groups
    return found


def not_a_server(server: str) -> InvalidRequest:
    """Return the error of something that answers, but not as a farstep server."""
    return InvalidRequest(
        f"{server} does not answer as a farstep server does.", remedy="Check the URL and its port.", side="client"
    )
