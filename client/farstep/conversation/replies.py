"""Answers without tensors: read within bounds, parsed and checked, or translated into an error.

    2xx                     JSON of at most so many bytes and containers; every member is taken by its type
    a problem document      the error of its code
    anything else           what stands in front of a server says such things, each in its own way: `_of_proxy`

An oversized answer is `ResponseTooLarge`, one that violates the protocol `InvalidAnswer`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final, Never, final

import httpx

from farstep.errors import (
    Busy,
    CannotConnect,
    FarstepError,
    InvalidAnswer,
    LimitExceeded,
    NoSuchRoute,
    ResponseTooLarge,
    Unauthorized,
    Unavailable,
    from_problem,
)
from farstep.errors.connecting import SERVE, cause_of
from farstep.transport import Answer, Readable

DOCUMENT_BYTES: Final = 1 << 20
"""The largest document that a worker accepts."""
PROBLEM_BYTES: Final = 64 << 10
MOST_CONTAINERS: Final = 1 << 18
"""Maps and arrays of a document: each takes two bytes in it, and at least 56 in memory."""
CHUNK_BYTES: Final = 64 << 10
LONGEST_PAUSE_S: Final = 86_400.0
LARGEST_INT: Final = 2**63 - 1
CHECK_URL: Final = (
    "Check that the URL is a farstep server's, its path included, and that no proxy answers in its place."
)


# -- reading ---------------------------------------------------------------------------------------------------------


def read_within(body: Readable, declared: int | None, most: int) -> bytearray:
    """Return a whole body.

    Args:
        body: the body.
        declared: its length, None if the head does not state it.
        most: the largest size in bytes.

    Raises:
        ResponseTooLarge: it is larger.
        httpx.TransportError: it was cut off.
    """
    if declared is not None and declared > most:
        raise too_large(f"The answer has {declared} bytes", most)
    whole, buffer = bytearray(), memoryview(bytearray(min(CHUNK_BYTES, most + 1)))
    while count := body.readinto(buffer):
        whole += buffer[:count]
        if len(whole) > most:
            raise too_large(f"The answer has more than {most} bytes", most)
    return whole


def too_large(what: str, most: int) -> ResponseTooLarge:
    """Return the error for an oversized answer."""
    return ResponseTooLarge(f"{what}; this client takes {most}.", limit=most, remedy=CHECK_URL, side="client")


def invalid_answer(detail: str, field: str | None = None) -> InvalidAnswer:
    """Return the error of an answer that is not what the protocol says."""
    return InvalidAnswer(detail, field=field, remedy=CHECK_URL, side="client")


def parsed(text: bytes | bytearray) -> object:
    """Return the value of a JSON text.

    Raises:
        ResponseTooLarge: it holds too many maps and arrays.
        InvalidAnswer: it is not JSON, repeats a key, or is nested too deep.
    """
    if text.count(b"{") + text.count(b"[") > MOST_CONTAINERS:
        raise too_large(f"The answer holds more than {MOST_CONTAINERS} maps and arrays", MOST_CONTAINERS)
    try:
        return json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise InvalidAnswer(f"The answer is no JSON: {str(exc)[:200]}.", side="client") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON")


# -- checking --------------------------------------------------------------------------------------------------------


@final
class ReplyReader:
    """Read an answer's members, each checked by its type. Unknown members are ignored.

    Args:
        values: the document or header.
        what: its description in errors.

    Raises:
        InvalidAnswer: it is not a map.
    """

    def __init__(self, values: object, what: str) -> None:
        if type(values) is not dict and not isinstance(values, Mapping):
            raise InvalidAnswer(f"{what} is {values!r:.80}; it must be a map.", remedy=CHECK_URL, side="client")
        self._values = values
        self._what = what

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, *, least: int = 0) -> int:
        """Return a whole number of 64 bits."""
        value = self._values.get(key)
        if type(value) is not int or not least <= value <= LARGEST_INT:
            raise self._wrong(key, value, f"an int of at least {least}")
        return value

    def number(self, key: str, *, least: float = 0.0) -> float:
        """Return a finite number."""
        value = self._values.get(key)
        if isinstance(value, (int, float)) and type(value) is not bool and least <= value <= LARGEST_INT:
            return float(value)  # NaN fails the comparison
        raise self._wrong(key, value, f"a finite number of at least {least:g}")

    def real(self, key: str) -> float:
        """Return a number, which may be NaN or infinite."""
        value = self._values.get(key)
        if type(value) is not float and (type(value) is not int or abs(value) > LARGEST_INT):
            raise self._wrong(key, value, "a number")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a bool."""
        value = self._values.get(key)
        if type(value) is not bool:
            raise self._wrong(key, value, "a bool")
        return value

    def text(self, key: str) -> str:
        """Return a text of at most 4,096 characters."""
        value = self._values.get(key)
        if type(value) is not str or len(value) > 4096:
            raise self._wrong(key, value, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """Return a list of texts."""
        value = self._values.get(key)
        if type(value) is not list or not set(map(type, value)) <= {str}:
            raise self._wrong(key, value, "a list of texts")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """Return a map."""
        value = self._values.get(key)
        if type(value) is not dict:
            raise self._wrong(key, value, "a map")
        return value

    def mappings(self, key: str) -> list[Mapping[str, Any]]:
        """Return a list of maps."""
        value = self._values.get(key)
        if type(value) is not list or not set(map(type, value)) <= {dict}:
            raise self._wrong(key, value, "a list of maps")
        return value

    def among(self, key: str, allowed: frozenset[str]) -> str:
        """Return one of a few texts."""
        value = self._values.get(key)
        if type(value) is not str or value not in allowed:
            raise self._wrong(key, value, f"one of {', '.join(sorted(allowed))}")
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> InvalidAnswer:
        found = f"is {value!r:.80}" if key in self._values else "is missing"
        return invalid_answer(f"{self._what}: {key!r} {found}; it must be {wanted}.", key)


# -- refusals --------------------------------------------------------------------------------------------------------


def error_of(answer: Answer, server: str, path: str, *, sent_bytes: int = 0) -> FarstepError:
    """Return the error for an answer other than 2xx.

    Args:
        answer: the answer, whose head has arrived.
        server: the server's URL.
        path: the path of the request.
        sent_bytes: the length of its body.

    Raises:
        httpx.TransportError: the answer was cut off.
    """
    document: object = None
    text = bytearray()
    if not answer.head.coding:
        try:
            text = read_within(answer.body, answer.head.length, PROBLEM_BYTES)
            document = parsed(text)
        except InvalidAnswer:
            document = None
    if isinstance(document, dict) and isinstance(document.get("code"), str):
        error = from_problem(document, answer.status)
        if isinstance(error, NoSuchRoute):
            error.remedy = f"Check the path of the URL, and that {server} is of a release that has {path}."
    else:
        error = _of_proxy(answer.status, text, server, path, sent_bytes)
    if isinstance(error, Unavailable):
        error.retry_after_s = retry_after_s(answer.response().headers)
        said = error.extra.get("retry_after_s")
        if isinstance(said, (int, float)) and said >= 0:  # more exact than the header
            error.retry_after_s = min(float(said), LONGEST_PAUSE_S)
    return error


def _of_proxy(status: int, text: bytearray, server: str, path: str, sent_bytes: int) -> FarstepError:
    """Return the error for an answer that is not a farstep server's own."""
    match status:
        case 401:
            return Unauthorized(
                f"{server} asks for credentials.", remedy="Give token=... or set FARSTEP_TOKEN.", side="client"
            )
        case 407:
            return CannotConnect(
                f"A proxy on the way to {server} asks for credentials.",
                remedy="Give transport=httpx.HTTPTransport(proxy=httpx.Proxy(url, auth=(user, password))).",
                side="client",
            )
        case 413:
            return LimitExceeded(
                f"Something in front of {server} does not take a body of {sent_bytes} bytes.",
                remedy="Raise the limit of the proxy (nginx: client_max_body_size 0).",
                side="client",
            )
        case 408 | 502 | 503 | 504:
            return Unavailable(f"a proxy answered {status} in the server's place", side="client")
        case 429:
            return Busy(f"a proxy in front of {server} limits how often it may be asked (429)", side="client")
        case 400 if b"https" in text.lower():
            return speaks_tls(server)
        case _ if 300 <= status < 400:
            return InvalidAnswer(
                f"{server} redirects {path} elsewhere ({status}), where nothing is sent, the token least of all.",
                remedy="Give the URL that it redirects to, if that is the server's own.",
                side="client",
            )
    return invalid_answer(f"{server} does not answer as a farstep server does: it said {status} to {path}.")


def speaks_tls(server: str) -> CannotConnect:
    """Return the error for a plain URL that leads to a TLS port."""
    return CannotConnect(f"{server}: what listens there speaks TLS.", remedy="Give the URL as https://.", side="client")


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of `Retry-After`, given as a number or a date; None without a valid one.

    A date is compared with the answer's own date, if it has one, as two clocks may differ.
    """
    said = headers.get("retry-after", "").strip()
    if said.isascii() and said.isdigit():
        return min(float(said[:9]), LONGEST_PAUSE_S)
    until = _seconds(said)
    now = _seconds(headers.get("date", ""))
    if until is None:
        return None
    return min(max(until - (time.time() if now is None else now), 0.0), LONGEST_PAUSE_S)


def _seconds(date: str) -> float | None:
    if not 20 <= len(date) <= 40:
        return None
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def why(error: Exception) -> tuple[str, str]:
    """Return why no answer came, as a part of a sentence, and the remedy."""
    if isinstance(error, FarstepError):
        return error.detail.rstrip("."), error.remedy or SERVE
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        cause = cause_of(TimeoutError() if isinstance(error, httpx.ConnectTimeout) else error)
        return (cause.reason, cause.remedy) if cause else ("nothing accepts connections there", SERVE)
    if isinstance(error, (httpx.ReadTimeout, httpx.WriteTimeout)):
        return "it accepted the connection, and then was silent", "See what keeps the server, or the network, busy."
    return f"the connection broke ({type(error).__name__})", SERVE
