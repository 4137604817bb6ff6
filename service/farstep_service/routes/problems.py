"""Errors as answers, in one place: RFC 9457 problem documents, also on the msgpack routes.

A client never sees a traceback. Any other error than farstep's own becomes `internal_error` with a number, which the
server's log shows beside the traceback.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import traceback
from http import HTTPStatus
from typing import Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farstep.errors import (
    Busy,
    FarstepError,
    InternalError,
    InvalidRequest,
    LimitExceeded,
    NoSuchMethod,
    NoSuchRoute,
    OutOfMemory,
    Recovering,
    Unauthorized,
    Unavailable,
)
from farstep_service.machine import out_of_memory
from farstep_service.routes.auth import PUBLIC, AllowedHosts, Tokens

PROBLEM = b"application/problem+json"
RETRY_AFTER_S = b"1"
LONGEST = {"detail": 1000, "field": 200, "limit": 200}
"""The most characters of a problem's texts."""

ADMITTED = "farstep.admitted"
"""Set in the scope of an authorised request; the server allows more time for its body."""

log = logging.getLogger("farstep.server")


class Edge:
    """The outermost layer: check the token and the host, run the application, and translate its errors."""

    def __init__(self, app: ASGIApp, tokens: Tokens, hosts: AllowedHosts) -> None:
        self.app = app
        self._tokens = tokens
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # only HTTP is supported
            await send({"type": "websocket.close", "code": 1008})
            return
        started = failed = False

        async def noting_send(message: Message) -> None:
            nonlocal started, failed
            if message["type"] == "http.response.start":
                started, failed = True, message["status"] >= HTTPStatus.BAD_REQUEST
            elif failed:
                message = {**message, "body": self._masked(scope, message.get("body", b""))}
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, noting_send)
        except asyncio.CancelledError:
            if started:
                raise
            await answer(Unavailable("The server is stopping.", remedy="Try again when it is back."), noting_send)
        except ClientDisconnect as exc:
            traceback.clear_frames(exc.__traceback__)
            path = self._masked(scope, scope["path"].encode()).decode()
            log.info("a client went away during %s %r", scope["method"], path)
        except Exception as exc:
            if started:
                raise
            # A failed decoder and its error keep each other alive, and the error's frames the gradients and the
            # session.
            traceback.clear_frames(exc.__traceback__)
            await answer(error_of(exc), noting_send)

    def _masked(self, scope: Scope, text: bytes) -> bytes:
        """Return a text that repeats data of a client, without credentials in it."""
        shown = (value for name, value in scope["headers"] if name == b"authorization")
        return self._tokens.masked(text, shown)

    def _check(self, scope: Scope) -> None:
        named: dict[bytes, list[bytes]] = {b"authorization": [], b"host": [], b"origin": []}
        for name, value in scope["headers"]:
            if name in named:
                named[name].append(value)
        path = scope["raw_path"].decode("latin-1").partition("?")[0]
        self._tokens.check(scope["method"], path, named[b"authorization"])
        self._hosts.check(
            version=scope["http_version"],
            hosts=named[b"host"],
            origins=named[b"origin"],
            unix=over_unix(scope),
        )
        if (scope["method"], path) not in PUBLIC:
            scope[ADMITTED] = True


def over_unix(scope: Scope) -> bool:
    """Return whether a request came over a unix socket."""
    return (scope.get("server") or ("", 0))[1] is None


def error_of(exc: Exception) -> FarstepError:
    """Return the farstep error for an exception."""
    if isinstance(exc, FarstepError):
        return exc
    if isinstance(exc, RequestValidationError):
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "too_long":
            return LimitExceeded(f"{where}: {first['msg']}.", field=where, limit=first["ctx"]["max_length"])
        return InvalidRequest(f"{where or 'The body'}: {first['msg']}.", field=where or None)
    if isinstance(exc, HTTPException):
        return http_error(exc.status_code, str(exc.detail))
    if short := out_of_memory(exc, "The request"):
        log.warning("a request found no memory: %s", exc)
        return short
    number = secrets.token_hex(4)
    log.error("internal error %s", number, exc_info=exc)
    return InternalError(
        f"The server met a defect of its own; its log has it as {number}.", remedy="Report it with that log."
    )


class Problem(BaseModel):
    """An error, as in RFC 9457. Some codes add facts of their own, such as `expected`."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    side: Literal["server", "client"]
    field: str | None = None
    limit: int | float | str | None = None
    remedy: str | None = None


def too_large(limit: int) -> LimitExceeded:
    """Return the error for a JSON document that is too large for its route."""
    return LimitExceeded(f"The document is larger than {limit} bytes.", limit=limit)


def http_error(status: int, detail: str) -> FarstepError:
    """Return the error for a status set by the framework."""
    if status == NoSuchRoute.status:
        return NoSuchRoute("There is no such path here.", remedy="The routes are listed at /docs.")
    if status == NoSuchMethod.status:
        return NoSuchMethod("The path does not have this method.", remedy="The routes are listed at /docs.")
    if status == LimitExceeded.status:
        return LimitExceeded(f"{detail}.")
    return InvalidRequest(f"{detail} ({status}).")


def problem_of(error: FarstepError, *, status: int | None = None) -> bytes:
    """Return the problem document of an error, with bounded texts, as these may repeat data of a client.

    Args:
        status: the HTTP status, if not the error's own.
    """
    document = error.to_problem()
    if status is not None:
        document["status"] = status
    for key, most in LONGEST.items():
        if isinstance(text := document.get(key), str) and len(text) > most:
            document[key] = f"{text[:most]}..."
    return json.dumps(document).encode()


async def answer(error: FarstepError, send: Send) -> None:
    """Send an error as the whole answer."""
    body = problem_of(error)
    headers = [(b"content-type", PROBLEM), (b"content-length", str(len(body)).encode())]
    if isinstance(error, Busy | OutOfMemory):
        headers.append((b"retry-after", RETRY_AFTER_S))
    if isinstance(error, Recovering):
        after_s = error.extra.get("retry_after_s")
        whole_s = math.ceil(after_s) if isinstance(after_s, (int, float)) and after_s > 0 else 1
        headers.append((b"retry-after", str(whole_s).encode()))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
