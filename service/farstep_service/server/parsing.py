"""The parser of a connection, for HTTP/1.1 only: an `Upgrade` is declined by ignoring it.

httptools treats a request for another protocol (`Upgrade: h2c`, from `curl --http2` and Java's HttpClient) as the last
one of HTTP/1.1 and does not read its body, which would then be the next request. A server that does not upgrade has to
ignore the request for it (RFC 9110, 7.8), so such a head is parsed again without it:

    head with Upgrade       url and headers are collected, nothing is begun
    the same without        as any other: it begins, and its body follows

The host in a target overrides the `Host` header (RFC 9112, 3.2.2), which is then set to it.
"""

from __future__ import annotations

from typing import Protocol, final

import httptools

ASKING = frozenset({b"upgrade", b"http2-settings"})
"""Headers, and words of `Connection`, that request another protocol."""


class Listener(Protocol):
    """The receiver of a request's parts, such as uvicorn's protocol; header names are in lower case."""

    url: bytes
    headers: list[tuple[bytes, bytes]]

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_body(self, body: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


@final
class Parser:
    """Parse the requests of a connection.

    Args:
        listener: receives their parts.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._asked = False
        self.on_message_begin = listener.on_message_begin
        self.on_url = listener.on_url
        self.on_header = listener.on_header
        self.on_body = listener.on_body
        self._parser = self._fresh()

    def feed_data(self, data: bytes | memoryview) -> None:
        """Parse received data.

        Raises:
            httptools.HttpParserError: it is not HTTP.
            httptools.HttpParserUpgrade: a CONNECT, after which nothing is HTTP.
        """
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as exc:
                if not self._asked:
                    raise
                data = memoryview(data)[exc.args[0] :]
            else:
                return
            head, self._parser = self._head_that_does_not_ask(), self._fresh()
            self._parser.feed_data(head)
            if not data:
                return

    def on_headers_complete(self) -> None:
        """Begin the request, unless its head must be parsed again."""
        self._asked = self._parser.should_upgrade() and self._parser.get_method() != b"CONNECT"
        if self._asked:
            return
        if authority := authority_of(self._listener.url):
            headers = self._listener.headers
            headers[:] = [(name, authority if name == b"host" else value) for name, value in headers]
        self._listener.on_headers_complete()

    def on_message_complete(self) -> None:
        """End the request, if it was begun."""
        if not self._asked:
            self._listener.on_message_complete()

    def get_http_version(self) -> str:
        """Return the version that the request names."""
        return str(self._parser.get_http_version())

    def get_method(self) -> bytes:
        """Return its method."""
        return bytes(self._parser.get_method())

    def should_keep_alive(self) -> bool:
        """Return whether another request may follow."""
        return bool(self._parser.should_keep_alive())

    def should_upgrade(self) -> bool:
        """Return whether what follows is not HTTP."""
        return bool(self._parser.should_upgrade())

    def _fresh(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # Bytes behind a last request are dropped; the client still reads its answer.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _head_that_does_not_ask(self) -> bytes:
        line = b"%s %s HTTP/%s\r\n" % (self.get_method(), self._listener.url, self.get_http_version().encode())
        lines = [line]
        for name, value in self._listener.headers:
            if name == b"connection":
                value = b", ".join(each for each in value.split(b",") if each.strip().lower() not in ASKING)
            if name not in ASKING:
                lines.append(b"%s: %s\r\n" % (name, value))
        return b"".join([*lines, b"\r\n"])


def authority_of(target: bytes) -> bytes:
    """Return the host and port that a request target names, b"" if it is a path."""
    _, found, rest = target.partition(b"://") if not target.startswith((b"/", b"*")) else (b"", b"", b"")
    return rest.partition(b"/")[0].partition(b"?")[0].partition(b"#")[0] if found else b""
