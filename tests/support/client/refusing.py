"""A transport that refuses some requests as a server would, and carries all others to a real one."""

from __future__ import annotations

import json
from collections.abc import Sequence

import httpx

from farstep.errors import FarstepError
from tests.support.client.carrying import Carrying


class Refusing(Carrying):
    """Refuse the next requests of one kind with errors, one after the other; those are never carried.

    Attributes:
        refused: the paths of the requests that were refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []
        self._kind = ("", "")
        self._errors: list[FarstepError] = []

    def refuse(self, method: str, path: str, *errors: FarstepError) -> None:
        """Answer the next requests whose path ends so with these errors."""
        self._kind, self._errors = (method, path), list(errors)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        method, end = self._kind
        if not self._errors or request.method != method or not path.endswith(end):
            return super().handle_request(request)
        error = self._errors.pop(0)
        self.refused.append(path)
        if request.stream is not None:
            for _ in request.stream:  # type: ignore[union-attr]  # of a client that is not asynchronous
                pass
        return problem(error)


def problem(error: FarstepError, headers: Sequence[tuple[str, str]] = ()) -> httpx.Response:
    """Return the answer that a server gives for an error."""
    body = json.dumps(error.to_problem()).encode()
    return httpx.Response(error.status, headers=[("content-type", "application/problem+json"), *headers], content=body)
