"""Conversation with a farstep server over httpx: JSON on the control routes, msgpack streams on the data routes.

Only this module knows URLs, statuses and content types; `farstep.http_link` sees records and errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast, final

import httpx

from farstep.conversation.bodies import Arrived, BuffersFor, Received, message, received
from farstep.conversation.replies import (
    CHECK_URL,
    DOCUMENT_BYTES,
    error_of,
    invalid_answer,
    parsed,
    read_within,
    speaks_tls,
)
from farstep.errors import (
    CannotConnect,
    FarstepError,
    InvalidAnswer,
    ResponseTooLarge,
    UnsupportedMedia,
    invalid_option,
)
from farstep.errors.connecting import cause_of, check_address
from farstep.protocol.unix import dialer, path_of_url
from farstep.transport import (
    DEADLINE_S,
    NAMED,
    Answer,
    BufferedBody,
    MalformedAnswer,
    OversizedAnswer,
    Route,
    SocketTransport,
    StreamedBody,
)
from farstep.transport.pieces import Payload, nbytes_of

MSGPACK = "application/msgpack"
JSON = "application/json"
FILE = "application/octet-stream"
CHUNK_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
ROUTES_KEPT = 32
"""Prepared requests to keep: those of successive steps are alike."""
LOCAL = "http://localhost"
"""The origin in requests to a unix socket; HTTP requires one."""
GREETED_WITHIN_S = 2.0
"""The time limit for finding out whether a port speaks TLS."""


@final
class _Exchange:
    """Raise what `lasting` makes of an error of the transport in its place; one context manager for every exchange."""

    def __init__(self, lasting: Callable[[httpx.TransportError], FarstepError | None]) -> None:
        self._lasting = lasting

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx.TransportError) and (lasting := self._lasting(error)) is not None:
            raise lasting from error


class Conversation:
    """The conversation with one server. Redirects are not followed, and nothing is decompressed.

    Args:
        server: its URL, without credentials; `unix:///path` for a socket.
        token: its bearer token, None if it needs none.
        transport: the httpx transport; the default avoids copies.
        read_timeout_s: longest silence of the server; also the longest wait for a connection, up to 10 s.

    Raises:
        InvalidOption: the URL holds credentials, or the token a character that no header can hold.
    """

    def __init__(
        self,
        server: str,
        token: str | None,
        *,
        transport: httpx.BaseTransport | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        check_address(server)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise invalid_option("The token holds a character that no token has.", field="token")
        self.server = server
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {})
        timeout = httpx.Timeout(min(CONNECT_TIMEOUT_S, read_timeout_s), read=read_timeout_s, write=read_timeout_s)
        path = path_of_url(server)
        self._transport = transport or (SocketTransport() if path is None else SocketTransport(dial=dialer(path)))
        self._client = httpx.Client(
            base_url=server if path is None else LOCAL,
            headers=headers,
            timeout=timeout,
            transport=self._transport,
            trust_env=False,
        )
        self._urls: dict[str, httpx.URL] = {}
        self._routes: dict[tuple[str, str, float], Route] = {}
        self._reached = False
        self._greeted = False

    def control(
        self,
        method: str,
        path: str,
        document: Mapping[str, Any] | None = None,
        *,
        within_s: float | None = None,
        largest: int = DOCUMENT_BYTES,
    ) -> dict[str, Any]:
        """Call a control route and return its JSON answer ({} for an empty one).

        Args:
            method, path: the route.
            document: what to send as JSON.
            within_s: seconds for the whole exchange, if it is to have a limit beside the silence.
            largest: the largest answer in bytes.

        Raises:
            InvalidOption: a number in the document is not finite.
            FarstepError: the problem the server answered with, an answer that is not of the protocol, or an address
                that leads to no server.
            httpx.TransportError: no complete answer came.
        """
        try:
            content = None if document is None else json.dumps(document, allow_nan=False).encode()
        except ValueError as exc:
            raise invalid_option("An option is NaN or infinite; options are finite numbers.") from exc
        request = self._request(method, path, None if content is None else BufferedBody([content]), 0.0, kind=JSON)
        if within_s is not None:
            request.extensions[DEADLINE_S] = within_s
        with _Exchange(self._lasting):
            return cast("dict[str, Any]", self._document(self._send(request), path, largest, len(content or b"")))

    def _document(self, answer: Answer, path: str, largest: int, sent_bytes: int) -> object:
        try:
            if not answer.ok:
                raise error_of(answer, self.server, path, sent_bytes=sent_bytes)
            self._check_coding(answer)
            text = read_within(answer.body, answer.head.length, largest)
            if text and not answer.head.kind.startswith(JSON.encode()):
                raise self._foreign(answer, path)
            return parsed(text) if text else {}
        finally:
            answer.close()

    def _extensions(self, wait_s: float) -> dict[str, Any]:
        timeout = self._client.timeout.as_dict()
        timeout["read"] = (timeout["read"] or 0.0) + wait_s
        return {"timeout": timeout, NAMED: True}

    def data(
        self,
        method: str,
        path: str,
        header: Mapping[str, Any] | None,
        payload: Payload,
        buffers_for: BuffersFor,
        *,
        arrived: Arrived | None = None,
        wait_s: float = 0.0,
    ) -> Received:
        """Send a header and a payload; receive a header, and a payload into the memory of `buffers_for`.

        Args:
            method, path: the route.
            header: what to send; None for a request without a body.
            payload: what follows it. An error that a `StreamedBody` raises while it is sent aborts the request, which
                the server then never completes, and is raised here.
            buffers_for: given the header, returns the memory for the answer's payload.
            arrived: called as it arrives, to process the bytes while a cache has them.
            wait_s: seconds the server may be silent beyond the usual, because it waits for other workers.

        Raises:
            FarstepError: the problem the server answered with, an answer that is not of the protocol, or an address
                that leads to no server.
            httpx.TransportError: no complete answer came; the memory of `buffers_for` is then unspecified.
        """
        answer = self.send(method, path, header, payload, wait_s=wait_s)
        return self.receive(answer, buffers_for, path, arrived=arrived, sent_bytes=nbytes_of(payload))

    def send(
        self, method: str, path: str, header: Mapping[str, Any] | None, payload: Payload, *, wait_s: float = 0.0
    ) -> Answer:
        """Do the first half of `data` and return when the head of an answer has arrived, for `receive`."""
        with _Exchange(self._lasting):
            return self._ask(method, path, None if header is None else message(header, payload), wait_s)

    def receive(
        self, answer: Answer, buffers_for: BuffersFor, path: str, *, arrived: Arrived | None = None, sent_bytes: int = 0
    ) -> Received:
        """Do the second half of `data`; `path` is what was asked for, with a body of `sent_bytes`."""
        with _Exchange(self._lasting):
            try:
                if not answer.ok:
                    raise error_of(answer, self.server, path, sent_bytes=sent_bytes)
                self._check_coding(answer)
                if not answer.head.kind.startswith(MSGPACK.encode()):
                    raise self._foreign(answer, path)
                return received(answer, buffers_for, arrived)
            finally:
                answer.close()

    def _ask(self, method: str, path: str, body: BufferedBody | StreamedBody | None, wait_s: float) -> Answer:
        """Send a request without httpx's client, its cookies and redirects, and without its objects if the transport
        can."""
        if not isinstance(self._transport, SocketTransport):
            return self._send(self._request(method, path, body, wait_s))
        route = self._routes.get((method, path, wait_s))
        if route is None:
            if len(self._routes) == ROUTES_KEPT:
                self._routes.clear()
            route = self._routes[method, path, wait_s] = Route(self._request(method, path, body, wait_s))
        answer = self._transport.ask(route, body)
        self._reached = True
        return answer

    def _send(self, request: httpx.Request) -> Answer:
        if self._client.is_closed:
            raise RuntimeError("This conversation has been closed.")
        response = self._transport.handle_request(request)
        response.request = request
        self._reached = True
        return Answer.of(response)

    def _lasting(self, error: httpx.TransportError) -> FarstepError | None:
        """Return the error of ours for what waiting cannot heal in an exchange, None for what it can.

        That is `CannotConnect` where the address leads to no server, and `InvalidAnswer` where what answers does not
        speak HTTP, or sends more around a body than there may be.
        """
        match error:
            case OversizedAnswer():
                return ResponseTooLarge(f"{self.server}: {error}", remedy=CHECK_URL, side="client")
            case MalformedAnswer():
                return InvalidAnswer(f"{self.server}: {error}", remedy=CHECK_URL, side="client")
            case httpx.ConnectError():
                cause = cause_of(error, reached=self._reached)
                if cause is not None and not cause.heals:
                    return CannotConnect(f"{self.server}: {cause.reason}.", remedy=cause.remedy, side="client")
            case httpx.ProxyError() if str(error).startswith(("401", "403", "407")):
                return CannotConnect(
                    f"The proxy on the way to {self.server} refused: {error}.",
                    remedy="Check the proxy of the transport, and its credentials.",
                    side="client",
                )
            case httpx.RemoteProtocolError() | httpx.ReadError() | httpx.WriteError():
                if self._turns_out_to_speak_tls():
                    return speaks_tls(self.server)
        return None

    def _turns_out_to_speak_tls(self) -> bool:
        """Return whether a server that has never answered speaks TLS: it would hang up on a plain request. Asked
        once."""
        url = self._client.base_url
        if self._reached or self._greeted or url.scheme != "http" or self.server.startswith("unix:"):
            return False
        self._greeted = True
        return isinstance(self._transport, SocketTransport) and self._transport.speaks_tls(url, GREETED_WITHIN_S)

    def download(self, path: str, take: Callable[[memoryview], object], *, wait_s: float = 0.0) -> int:
        """Request a file and pass its bytes on as they arrive; return their number.

        Args:
            path: the route.
            take: called with the bytes, in memory that is then reused.
            wait_s: seconds the server may be silent beyond the usual, because it prepares the file.

        Raises:
            FarstepError: the problem the server answered with.
            httpx.TransportError: no complete answer came.
        """
        with _Exchange(self._lasting):
            answer = self._send(self._request("GET", path, None, wait_s))
            try:
                if not answer.ok:
                    raise error_of(answer, self.server, path)
                self._check_coding(answer)
                if answer.head.kind != FILE.encode():
                    raise self._foreign(answer, path)
                buffer, received = memoryview(bytearray(CHUNK_BYTES)), 0
                while count := answer.body.readinto(buffer):
                    take(buffer[:count])
                    received += count
                if answer.head.length not in (None, received):
                    raise httpx.RemoteProtocolError("the answer was cut off")
                return received
            finally:
                answer.close()

    def upload(self, path: str, body: httpx.SyncByteStream, nbytes: int, *, wait_s: float = 0.0) -> dict[str, Any]:
        """Send a file of `nbytes` and return the JSON answer.

        Raises:
            FarstepError: the problem the server answered with, or an answer that is not of the protocol.
            httpx.TransportError: no complete answer came.
        """
        request = self._request("PUT", path, body, wait_s, kind=FILE, nbytes=nbytes)
        with _Exchange(self._lasting):
            return cast("dict[str, Any]", self._document(self._send(request), path, DOCUMENT_BYTES, nbytes))

    def _request(
        self,
        method: str,
        path: str,
        body: httpx.SyncByteStream | None,
        wait_s: float,
        *,
        kind: str = MSGPACK,
        nbytes: int | None = None,
    ) -> httpx.Request:
        url = self._urls.get(path)
        if url is None:
            if len(self._urls) == ROUTES_KEPT:
                self._urls.clear()
            url = self._urls[path] = self._client.build_request(method, path).url
        headers = self._client.headers.copy()
        if body is not None:
            headers["content-type"] = kind
            headers["content-length"] = str(body.nbytes if isinstance(body, BufferedBody | StreamedBody) else nbytes)
            headers.setdefault("host", url.netloc.decode("ascii"))  # httpx leaves it out beside a stream
        return httpx.Request(method, url, headers=headers, stream=body, extensions=self._extensions(wait_s))

    def close(self) -> None:
        """Close every connection."""
        self._client.close()

    def _check_coding(self, answer: Answer) -> None:
        if coding := answer.head.coding[:40].decode("latin-1"):
            raise UnsupportedMedia(
                f"{self.server} answers in the encoding {coding!r}, and none was asked for.",
                remedy="Switch off the compression of what is in front of the server.",
                field="content-encoding",
                side="client",
            )

    def _foreign(self, answer: Answer, path: str) -> InvalidAnswer:
        kind = answer.head.kind[:80].decode("latin-1")
        return invalid_answer(
            f"{self.server} does not answer as a farstep server does: it said {answer.status} to {path}, "
            f"of the type {kind!r}."
        )
