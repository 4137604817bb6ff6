"""The transport that httpx is given: bodies go from memory to the socket and from the socket into memory.

    httpx.Client(base_url=..., auth=..., timeout=..., transport=SocketTransport(verify=...))

Users keep httpx's client and everything they configure on it. Beside `httpx.HTTPTransport` (100 MB each way over
loopback: about five times the time of bare sockets; it copies the unsent rest at every partial send) this one

* sends the buffers of a `BufferedBody` where they lie, the head in front of them in the same system call, and those
  of a `StreamedBody` as they are made;
* gives the body of a response to `readinto`, see `body_of`;
* listens while it sends, so that 401 and 413 arrive instead of a broken pipe;
* sends `Accept-Encoding: identity` unless told otherwise and decompresses nothing.

When the server had closed a kept connection before it said anything, a request is sent once more over a new one if
that is harmless: its method is idempotent, or `extensions={"farstep_named": True}` says that the server recognises
repetitions. Any other request raises. A deadline over the whole exchange is `extensions={"farstep_deadline_s": 30}`;
httpx's timeouts are per read and write. There is no limit on connections in use, hence never a `PoolTimeout`.

Not here: HTTP proxies (`HTTP_PROXY` is not consulted, because httpx leaves a transport that it was given alone) and
HTTP/2. For those use `httpx.HTTPTransport`: everything works over it, slower. Looking up a host name takes the
system's own time limit, which no timeout of ours can shorten.
"""

from __future__ import annotations

import socket
import ssl
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

import httpx

from farstep.transport.body import ResponseBody
from farstep.transport.connection import Connection, Timeouts
from farstep.transport.head import IDEMPOTENT, NAMED, ResponseHead, request_head
from farstep.transport.pieces import BufferedBody, StreamedBody
from farstep.transport.pool import Origin, Pool, origin_of
from farstep.transport.route import Answer, Described, Route, response_of
from farstep.transport.stream import PlainStream, Stream, TlsStream

Dial = Callable[[Origin, float | None], socket.socket]
"""Connect to an origin within so many seconds; raises OSError (TimeoutError when they have passed)."""

Resolve = Callable[..., Sequence[tuple[int, int, int, str, Any]]]
"""Find the addresses of a host and port, as `socket.getaddrinfo` does."""

Message = Callable[[], Iterable[Iterable[memoryview]]]
"""Gives the bytes of a request, head and body, in lists of buffers that are sent together."""

_GREETING_BYTES: Final = 16_384
_SHORTEST_S: Final = 0.001  # a timeout of 0 would make the socket non-blocking
_KEEPALIVE_S: Final = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


def dial_tcp(origin: Origin, timeout_s: float | None, *, resolve: Resolve = socket.getaddrinfo) -> socket.socket:
    """Connect to the first address of `origin` that answers.

    The socket sends small packets at once and notices within 35 seconds that the other machine is gone, also when
    the user asked for no timeout at all.

    Args:
        origin: host and port.
        timeout_s: seconds for all addresses together.
        resolve: finds the addresses of a name.

    Raises:
        OSError: none answered, or the name is unknown; TimeoutError when the time had passed.
    """
    until = None if timeout_s is None else time.monotonic() + timeout_s
    failure: OSError = OSError(f"{origin.host} has no address")
    for family, kind, protocol, _, address in resolve(origin.host, origin.port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(None if until is None else max(until - time.monotonic(), _SHORTEST_S))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if sys.platform == "linux":
                for option, value in _KEEPALIVE_S.items():
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            return sock
        except OSError as exc:
            sock.close()
            failure = exc
        except BaseException:
            sock.close()
            raise
    raise failure


@final
class SocketTransport(httpx.BaseTransport):
    """Carry httpx's requests over sockets, bodies without copies. Threads may share one.

    Args:
        verify: how certificates are checked: an `ssl.SSLContext`, or as `httpx.Client` has it. It is given here
            because httpx ignores its own `verify` when it is given a transport.
        idle_connections: connections kept open for each origin between requests.
        idle_s: seconds after which such a connection is not used again.
        dial: makes the connected sockets; another one connects elsewhere, as `farstep.protocol.unix` does.
    """

    def __init__(
        self,
        *,
        verify: ssl.SSLContext | bool = True,
        idle_connections: int = 16,
        idle_s: float = 60.0,
        dial: Dial = dial_tcp,
    ) -> None:
        self._verify = verify
        self._context: ssl.SSLContext | None = None
        self._dial = dial
        self._pool = Pool(idle_connections=idle_connections, idle_s=idle_s)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return the response as soon as its head is there.

        Raises:
            httpx.ConnectError, httpx.ConnectTimeout: no connection; the request has not been sent.
            httpx.WriteError, httpx.WriteTimeout, httpx.ReadError, httpx.ReadTimeout: the outcome is unknown.
            httpx.RemoteProtocolError: the server hung up; the outcome is unknown.
            MalformedAnswer: it does not speak HTTP/1.1, or what it sent is too large (`OversizedAnswer`).
            httpx.LocalProtocolError, httpx.UnsupportedProtocol: the request itself is at fault.
        """
        asked = _Asked(request, origin_of(request), Timeouts.of(request.extensions), _repeatable(request))
        return response_of(*self._ask(asked, partial(_message, request)), request)

    def ask(self, route: Route, body: BufferedBody | StreamedBody | None) -> Answer:
        """Send a body over a route and return the answer as soon as its head is there.

        Args:
            route: says where to.
            body: None for a request without one.

        Raises:
            httpx.TransportError: see `handle_request`.
        """
        head = route.head(0 if body is None else body.nbytes)
        answer, received = self._ask(route, partial(_with_body, head, body))
        return Answer(
            answer.status,
            received,
            received.close,
            Described.by(answer),
            partial(response_of, answer, received, route.request),
        )

    def speaks_tls(self, url: httpx.URL, within_s: float) -> bool:
        """Find out whether what listens where a plain URL leads speaks TLS; it is sent a greeting and nothing else."""
        try:
            sock = self._dial(origin_of(httpx.Request("GET", url)), within_s)
        except OSError:
            return False
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is said over it
        heard, said = ssl.MemoryBIO(), ssl.MemoryBIO()  # a socket that is wrapped stays open where that fails
        greeting = context.wrap_bio(heard, said)
        with sock:
            try:
                sock.settimeout(within_s)
                while True:
                    whole = False
                    with suppress(ssl.SSLWantReadError):
                        greeting.do_handshake()
                        whole = True
                    sock.sendall(said.read())
                    if whole:
                        return True
                    if not (answer := sock.recv(_GREETING_BYTES)):
                        return False
                    heard.write(answer)
            except ssl.SSLError as exc:
                return "ALERT" in (exc.reason or "")
            except OSError:
                return False

    def close(self) -> None:
        """Close every connection; a thread that is using one gets an error."""
        self._pool.close()

    def _ask(self, asked: _Asked | Route, message: Message) -> tuple[ResponseHead, ResponseBody]:
        try:
            kept = self._pool.take(asked.origin)
            if kept is not None:
                try:
                    return self._exchange(kept, asked, message)
                except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                    if kept.heard or not asked.repeatable:
                        raise
            connection = Connection(self._connect(asked.origin, asked.timeouts))
            self._pool.add(connection)
            return self._exchange(connection, asked, message)
        except httpx.RequestError as exc:
            exc.request = asked.request  # httpx's client does this too, but not all callers use it
            raise

    def _exchange(
        self, connection: Connection, asked: _Asked | Route, message: Message
    ) -> tuple[ResponseHead, ResponseBody]:
        try:
            connection.begin(asked.request.method, asked.timeouts)
            batches = message()
            if isinstance(batches, Generator):
                with closing(batches):
                    complete = all(map(connection.send, batches))
            else:
                complete = all(map(connection.send, batches))
            head = connection.answer()
            release = partial(self._release, asked.origin)
            return head, ResponseBody(connection, head, request=asked.request, release=release, complete=complete)
        except BaseException:
            self._pool.drop(connection)
            raise

    def _release(self, origin: Origin, connection: Connection, reusable: bool) -> None:
        if reusable:
            self._pool.give(origin, connection)
        else:
            self._pool.drop(connection)

    def _connect(self, origin: Origin, timeouts: Timeouts) -> Stream:
        try:
            sock = self._dial(origin, timeouts.left(timeouts.connect_s))
        except TimeoutError as exc:
            raise httpx.ConnectTimeout(f"{origin.host}:{origin.port} did not answer in time.") from exc
        except OSError as exc:
            raise httpx.ConnectError(f"No connection to {origin.host}:{origin.port}: {exc}") from exc
        if origin.scheme == "http":
            return PlainStream(sock)
        try:
            left_s = timeouts.left(timeouts.connect_s)
            sock.settimeout(None if left_s is None else max(left_s, _SHORTEST_S))
            return TlsStream(
                self._tls().wrap_socket(sock, server_hostname=origin.server_name, suppress_ragged_eofs=False)
            )
        except TimeoutError as exc:
            sock.close()
            raise httpx.ConnectTimeout(f"{origin.host}:{origin.port} did not begin TLS in time.") from exc
        except OSError as exc:
            sock.close()
            raise httpx.ConnectError(f"No TLS with {origin.host}:{origin.port}: {exc}") from exc

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = httpx.create_ssl_context(verify=self._verify)
        return self._context


@final
@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of a connection, but for the bytes; a `Route` says the same of many requests."""

    request: httpx.Request
    origin: Origin
    timeouts: Timeouts
    repeatable: bool


def _repeatable(request: httpx.Request) -> bool:
    harmless = request.method in IDEMPOTENT or bool(request.extensions.get(NAMED))
    return harmless and isinstance(request.stream, BufferedBody | StreamedBody | httpx.ByteStream)


def _with_body(head: memoryview, body: BufferedBody | StreamedBody | None) -> Iterable[Iterable[memoryview]]:
    """Return a head and the buffers of its body, in lists of buffers that are sent together."""
    if isinstance(body, StreamedBody):
        return _with_batches(head, body)
    return ([head, *body.views] if body is not None else [head],)


def _with_batches(head: memoryview, body: StreamedBody) -> Generator[Iterable[memoryview]]:
    first = [head]
    with closing(body.batches()) as batches:
        for batch in batches:
            yield [*first, *BufferedBody(batch).views]
            first = []
    yield first


def _message(request: httpx.Request) -> Generator[Iterable[memoryview]]:
    """Yield the request, head and body, in lists of buffers that are sent together."""
    stream = request.stream
    if not isinstance(stream, httpx.SyncByteStream):
        raise httpx.LocalProtocolError("An async body was given to a sync client.")
    if isinstance(stream, httpx.ByteStream):
        stream = BufferedBody(stream)
    if isinstance(stream, BufferedBody | StreamedBody):
        yield from _with_body(memoryview(request_head(request, stream.nbytes)), stream)
        return
    stated = request.headers.get("Content-Length")
    declared = None if stated is None else int(stated)
    yield [memoryview(request_head(request, declared))]
    sent = 0
    for chunk in stream:
        piece = BufferedBody([chunk])
        sent += piece.nbytes
        if declared is None and piece.nbytes:
            yield [memoryview(b"%x\r\n" % piece.nbytes), *piece.views, memoryview(b"\r\n")]
        elif declared is not None and sent <= declared:
            yield piece.views
    if declared is None:
        yield [memoryview(b"0\r\n\r\n")]
    elif sent != declared:
        raise httpx.LocalProtocolError(f"The body has {sent} bytes, but its Content-Length says {declared}.")
