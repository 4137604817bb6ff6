"""How a verb asks a server: which one, with which token, and what to say when it does not answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farstep.errors import FarstepError, InvalidOption, InvalidRequest, Unavailable
from farstep.unix import url_of_path
from farstep_service.settings import DEFAULT_PORT

if TYPE_CHECKING:
    from farstep.conversation import Conversation

READ_TIMEOUT_S = 10.0


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


def documents_of(speaking: Conversation, path: str) -> list[dict[str, Any]]:
    """Return a list of documents that the server has at a path.

    Raises:
        InvalidRequest: the answer is not a farstep server's.
    """
    answer: object = speaking.control("GET", path)
    if not isinstance(answer, list):
        raise not_a_server(speaking.server)
    return answer


def not_a_server(server: str) -> InvalidRequest:
    """Return the error of something that answers, but not as a farstep server."""
    return InvalidRequest(
        f"{server} does not answer as a farstep server does.", remedy="Check the URL and its port.", side="client"
    )
