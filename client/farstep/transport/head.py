"""HTTP/1.1 heads, without I/O: a request's as bytes, a response's as a record; and the extensions of both.

The standard library's parser passes every header to the mail parser: 19 us for five headers, where this takes 4, and a
small push has about 200 in total. It also wants a file to block on, while an answer that arrives during sending has to
be recognised without waiting. The end of a body follows RFC 9112 section 6.3; what that section calls an error is one
here, because two readers that disagree about the end of a body are a security hole.

The constants below are keys of `httpx.Request.extensions` and `httpx.Response.extensions`, by which a request
configures the transport; other transports ignore them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import httpx

NAMED: Final = "farstep_named"
"""Request: true when the server recognises a repetition, so that sending it twice changes nothing more than once."""

DEADLINE_S: Final = "farstep_deadline_s"
"""Request: seconds from the call until the last byte of the answer's body, whatever each single read or write took."""

BODY: Final = "farstep_body"
"""Response: the answer's body as something with `readinto`; read it through `farstep.transport.body_of`."""


IDEMPOTENT: Final = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"})
"""Methods that may be sent twice, by themselves (RFC 9110 section 9.2.2)."""
MAX_HEAD_BYTES: Final = 65536
MAX_HEADERS: Final = 256
END: Final = b"\r\n\r\n"
HEADS_KEPT: Final = 32
"""Heads to remember: those of successive steps are alike."""

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([^\x00\r\n]*))?")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00\r\n]*)")
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FRAMING: Final = (b"content-length", b"transfer-encoding", b"accept-encoding")


class MalformedAnswer(httpx.RemoteProtocolError):
    """The server's answer is not HTTP/1.1; a retry would not help."""


class OversizedAnswer(MalformedAnswer):
    """A head, or the framing of a body, is too large."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The head of a response.

    Attributes:
        status: the status code.
        reason: the phrase after it.
        version: `HTTP/1.1` or `HTTP/1.0`.
        headers: names and values in their order.
        length: bytes of the body; None if its own framing, or the end of the connection, delimits it.
        chunked: the body is in chunks.
        reusable: the connection may carry another request after the body.
        kind: the body's `Content-Type`, empty if there is none.
        coding: its `Content-Encoding`, empty for none.
    """

    status: int
    reason: bytes
    version: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    length: int | None
    chunked: bool
    reusable: bool
    kind: bytes = b""
    coding: bytes = b""


def _default_accept_encoding() -> bytes:
    with httpx.Client(transport=httpx.BaseTransport(), trust_env=False) as client:
        return client.headers["Accept-Encoding"].encode("ascii")


_HTTPX_ACCEPTS = _default_accept_encoding()


def request_head(request: httpx.Request, body_bytes: int | None) -> bytes:
    """Return the head of a request; cached, as those of successive steps are mostly equal.

    Args:
        request: its own `Content-Length` and `Transfer-Encoding` are replaced according to `body_bytes`. The default
            `Accept-Encoding` of httpx becomes `identity`; another one is the user's and stays.
        body_bytes: the body's length; None for a body in chunks.

    Raises:
        httpx.LocalProtocolError: a header or the target holds a character that would end the line.
    """
    return _request_head(request.method, request.url.raw_path, tuple(request.headers.raw), body_bytes)


@lru_cache(maxsize=HEADS_KEPT)
def _request_head(method: str, target: bytes, raw: tuple[tuple[bytes, bytes], ...], body_bytes: int | None) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (method.encode("ascii"), target)]
    lines += [b"%s: %s" % (name, value) for name, value in raw if name.lower() not in _FRAMING]
    accepted = [value for name, value in raw if name.lower() == b"accept-encoding" and value != _HTTPX_ACCEPTS]
    lines.append(b"Accept-Encoding: " + (b", ".join(accepted) or b"identity"))
    if body_bytes is None:
        lines.append(b"Transfer-Encoding: chunked")
    elif body_bytes or method in ("POST", "PUT", "PATCH"):
        lines.append(b"Content-Length: %d" % body_bytes)
    head = b"\r\n".join(lines) + END
    breaks = len(lines) + 1
    if head.count(b"\r") != breaks or head.count(b"\n") != breaks or b"\0" in head or lines[0].count(b" ") != 2:
        raise httpx.LocalProtocolError("A header, the method or the URL holds a line break, NUL or space.")
    if not all(_NAME.fullmatch(name) for name, _ in raw):
        raise httpx.LocalProtocolError("A header's name holds a character that HTTP does not allow in one.")
    return head


@lru_cache(maxsize=HEADS_KEPT)
def response_head(block: bytes, method: str) -> ResponseHead:
    """Return the head of a response.

    Args:
        block: the head without the empty line that ends it.
        method: the request's method; an answer to HEAD has no body.

    Raises:
        MalformedAnswer: it is not an HTTP/1 head, or does not delimit the body.
        OversizedAnswer: it has too many headers.
    """
    first, *lines = block.split(b"\r\n")
    status_line = _STATUS.fullmatch(first)
    if status_line is None:
        raise MalformedAnswer(f"The server's answer is not HTTP/1: it begins with {first[:40]!r}.")
    if len(lines) > MAX_HEADERS:
        raise OversizedAnswer(f"The server sent {len(lines)} headers; the limit is {MAX_HEADERS}.")
    headers: list[tuple[bytes, bytes]] = []
    lengths: set[bytes] = set()
    codings: list[bytes] = []
    connection: list[bytes] = []
    kinds: list[bytes] = []
    encodings: list[bytes] = []
    for line in lines:
        header = _HEADER.fullmatch(line)
        if header is None:
            raise MalformedAnswer(f"The server sent a malformed header: {line[:80]!r}.")
        name, value = header[1], header[2].rstrip(b" \t")
        headers.append((name, value))
        match name.lower():
            case b"content-length":
                lengths.update(each.strip() for each in value.split(b","))
            case b"transfer-encoding":
                codings += [each.strip().lower() for each in value.split(b",")]
            case b"connection":
                connection += [each.strip().lower() for each in value.split(b",")]
            case b"content-type":
                kinds.append(value)
            case b"content-encoding" if value.lower() != b"identity":
                encodings.append(value)
    status, version = int(status_line[2]), b"HTTP/1." + status_line[1]
    length, chunked = _framing(status, method, lengths, codings)
    return ResponseHead(
        status=status,
        reason=status_line[3] or b"",
        version=version,
        headers=tuple(headers),
        length=length,
        chunked=chunked,
        reusable=(
            version == b"HTTP/1.1"
            and b"close" not in connection
            and (chunked or length is not None)
            and not (chunked and lengths)
        ),
        kind=b", ".join(kinds),
        coding=b", ".join(encodings),
    )


def _framing(status: int, method: str, lengths: set[bytes], codings: list[bytes]) -> tuple[int | None, bool]:
    if len(lengths) > 1 or any(not each.isdigit() or len(each) > 18 for each in lengths):
        raise MalformedAnswer(f"The server sent an invalid Content-Length: {sorted(lengths)}.")
    if codings not in ([], [b"chunked"]):
        raise MalformedAnswer(f"The server sent a Transfer-Encoding that the client cannot read: {codings}.")
    if method == "HEAD" or status < 200 or status in (204, 304):
        return 0, False
    if codings:
        return None, True
    return (int(next(iter(lengths))) if lengths else None), False


def chunk_size(line: bytes) -> int:
    """Return the length that the first line of a chunk states, without its line break.

    Raises:
        MalformedAnswer: it is not a hexadecimal number of at most 15 digits.
    """
    digits = line.partition(b";")[0].strip(b" \t")
    if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", digits):
        raise MalformedAnswer(f"The server sent a malformed chunk size: {line[:40]!r}.")
    return int(digits, 16)
