"""Errors from problem documents (RFC 9457), which are checked: the other side sent them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

from farstep.errors.tree import CannotConnect, FarstepError, Scalar

TOO_MANY_REQUESTS: Final = 429
LONGEST_TEXT: Final = 2000
"""Characters of a received text, at most."""
MOST_LISTED: Final = 1000


def _family(root: type[FarstepError]) -> list[type[FarstepError]]:
    return [root, *(each for child in root.__subclasses__() for each in _family(child))]


BY_CODE: Mapping[str, type[FarstepError]] = {each.code: each for each in _family(FarstepError)}
"""Every error class under its code."""


def from_problem(problem: Mapping[str, object], status: int) -> FarstepError:
    """Return the error that a problem document describes.

    Args:
        problem: the parsed document, still unchecked; a newer server may send a code that is not known here.
        status: the HTTP status of the answer, which decides the class of an unknown code.
    """
    known = {"type", "title", "status", "code", "detail", "side", "field", "limit", "remedy", "self"}
    code = problem.get("code")
    kind = BY_CODE.get(code) if isinstance(code, str) else None
    if kind is None:
        kind = BY_CODE["busy"] if status == TOO_MANY_REQUESTS else _of_status(status)
    found = problem.get("limit")
    limit: int | float | str | None = None
    if isinstance(found, str):
        limit = _text(problem, "limit")
    elif isinstance(found, (int, float)):
        limit = found
    extra = {
        name: _shortened(value)
        for name, value in problem.items()
        if name not in known and (value is None or isinstance(value, (str, int, float, bool, list)))
    }
    return kind(
        _text(problem, "detail") or f"The server answered {status}.",
        remedy=_text(problem, "remedy"),
        field=_text(problem, "field") or None,
        limit=limit,
        side="client" if problem.get("side") == "client" else "server",
        **extra,
    )


def _of_status(status: int) -> type[FarstepError]:
    return next(
        (each for each in BY_CODE.values() if each.status == status and each is not CannotConnect), FarstepError
    )


def _text(problem: Mapping[str, object], key: str) -> str:
    """Return a member for display: one line, without control characters, and shortened."""
    value = problem.get(key)
    text = "" if value is None else str(value)[:LONGEST_TEXT].replace("\n", " ")
    return "".join(each for each in text if each.isprintable())


def _shortened(value: object) -> Scalar | list[str]:
    if isinstance(value, list):
        return [str(each)[:LONGEST_TEXT] for each in value[:MOST_LISTED]]
    return value[:LONGEST_TEXT] if isinstance(value, str) else cast("Scalar", value)
