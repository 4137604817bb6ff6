"""Speak with a farstep server over httpx: JSON on the control routes, msgpack streams on the data routes.

One place where a URL, a status or a content type is known; `farstep.http_link` sees records and errors only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import httpx

from farstep.errors import FarstepError, InvalidOption, InvalidRequest, Unauthorized, Unavailable, from_problem
from farstep.payload import Payload, batches_of, nbytes_of
from farstep.transport import DEADLINE_S, NAMED, Answer, Batch, Pieces, Route, SocketTransport, Supply, body_of
from farstep.unix import dialer, path_of_url
from farstep.wire import Decoder, Frames, encode, encoded_size
from farstep.wire.packing import pack_header

MSGPACK = "application/msgpack"
FILE = "application/octet-stream"
CHUNK_BYTES = 1 << 20
HOT_BYTES = 256 * 1024
"""Bytes of an answer that are received at once, at most, where something is done with them next."""
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
ROUTES_KEPT = 32
"""Requests that are kept prepared: those of one step after the other are alike."""
LOCAL = "http://localhost"
"""What requests to a server at a path name as their origin; HTTP wants one."""
FROM_PROXIES = frozenset({502, 503, 504})
"""What a proxy answers while the server behind it is away."""

Place = Callable[[dict[str, Any]], Sequence[memoryview]]
Arrived = Callable[[int], object]
"""Called with the payload bytes that have arrived so far."""


@dataclass(frozen=True, slots=True)
class Received:
    """An answer of a data route: its header, its payload's size, and how long the payload took to arrive."""

    header: dict[str, Any]
    payload_bytes: int
    receive_s: float


class Conversation:
    """Speak with one server.

    Args:
        server: its URL; one of a path (`unix:///...`) is reached through that socket.
        token: its bearer token, None where it asks for none.
        transport: what carries the bytes; the default moves them without copies.
        read_timeout_s: longest silence of the server, and longest wait for a connection up to 10 s.
    """

    def __init__(
        self,
        server: str,
        token: str | None,
        *,
        transport: httpx.BaseTransport | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self.server = server
        headers = {"authorization": f"Bearer {token}"} if token else {}
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

    def control(
        self, method: str, path: str, document: Mapping[str, Any] | None = None, *, within_s: float | None = None
    ) -> dict[str, Any]:
        """Ask a control route and return its JSON answer ({} where it has none).

        Args:
            method, path: the route.
            document: what to send as JSON.
            within_s: seconds that all of it may take, where silence alone is not the limit.

        Raises:
            InvalidOption: a number in the document is not finite.
            FarstepError: the problem the server answered with, or an answer that is not of the protocol.
            httpx.TransportError: no complete answer came.
        """
        try:
            content = None if document is None else json.dumps(document, allow_nan=False)
        except ValueError as exc:
            raise InvalidOption("An option is NaN or infinite; options are finite numbers.", side="client") from exc
        headers = {} if content is None else {"content-type": "application/json"}
        extensions = self._extensions(0.0) | ({} if within_s is None else {DEADLINE_S: within_s})
        response = self._client.request(method, path, content=content, headers=headers, extensions=extensions)
        if not response.is_success:
            raise self._problem(response)
        try:
            return cast("dict[str, Any]", response.json()) if response.content else {}
        except ValueError as exc:
            raise self._foreign(response) from exc

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
        place: Place,
        *,
        arrived: Arrived | None = None,
        wait_s: float = 0.0,
    ) -> Received:
        """Send a header and a payload, and receive a header and a payload into where `place` says.

        Args:
            method, path: the route.
            header: what to send; None for a request without a body.
            payload: what follows it; what a `Supply` raises while the request is sent ends the request, which the
                server then never has, and is raised here.
            place: says where the answer's payload goes.
            arrived: called while it comes, so that something is done with it that is in the cache still.
            wait_s: seconds the server may be silent beyond the usual, because it waits for others.

        Raises:
            FarstepError: the problem the server answered with, or an answer that is not of the protocol.
            httpx.TransportError: no complete answer came; memory that `place` named is then unspecified.
        """
        return self.receive(self.send(method, path, header, payload, wait_s=wait_s), place, arrived=arrived)

    def send(
        self, method: str, path: str, header: Mapping[str, Any] | None, payload: Payload, *, wait_s: float = 0.0
    ) -> Answer:
        """Do the first half of `data` and return when the head of an answer is there, for `receive`."""
        return self._ask(method, path, None if header is None else _message(header, payload), wait_s)

    def receive(self, answer: Answer, place: Place, *, arrived: Arrived | None = None) -> Received:
        """Do the second half of `data`."""
        try:
            if not answer.ok:
                raise self._problem(answer.response())
            began = time.perf_counter()
            decoder = Decoder(place, side="client")
            early = answer.body.arrived()
            decoder.feed(early)
            answer.body.skip(len(early))
            if arrived is not None:
                arrived(decoder.received)
            while not decoder.done:
                buffer = decoder.get_buffer()
                count = answer.body.readinto(buffer if arrived is None else buffer[:HOT_BYTES])
                if count == 0:
                    raise httpx.RemoteProtocolError("the answer was cut off")
                decoder.buffer_updated(count)
                if arrived is not None:
                    arrived(decoder.received)
            decoder.close()
            return Received(decoder.header, decoder.payload_bytes, time.perf_counter() - began)
        finally:
            answer.close()

    def _ask(self, method: str, path: str, body: Pieces | Supply | None, wait_s: float) -> Answer:
        """Send a request past httpx's client, its cookies and redirects, and past its objects if the transport can."""
        if not isinstance(self._transport, SocketTransport):
            request = self._request(method, path, body, wait_s)
            response = self._transport.handle_request(request)
            response.request = request
            return Answer.of(response)
        route = self._routes.get((method, path, wait_s))
        if route is None:
            if len(self._routes) == ROUTES_KEPT:
                self._routes.clear()
            route = self._routes[method, path, wait_s] = Route(self._request(method, path, body, wait_s))
        return self._transport.ask(route, body)

    def download(self, path: str, take: Callable[[memoryview], object], *, wait_s: float = 0.0) -> int:
        """Ask for a file and hand its bytes on as they come; return how many there were.

        Args:
            path: the route.
            take: called with memory that is used again for what follows.
            wait_s: seconds the server may be silent beyond the usual, because it prepares the file.

        Raises:
            FarstepError: the problem the server answered with.
            httpx.TransportError: no complete answer came.
        """
        request = self._request("GET", path, None, wait_s)
        response = self._transport.handle_request(request)
        response.request = request
        try:
            if not response.is_success:
                response.read()
                raise self._problem(response)
            body, buffer, received = body_of(response), memoryview(bytearray(CHUNK_BYTES)), 0
            while count := body.readinto(buffer):
                take(buffer[:count])
                received += count
            if response.headers.get("content-length", str(received)) != str(received):
                raise httpx.RemoteProtocolError("the answer was cut off", request=request)
            return received
        finally:
            response.close()

    def upload(self, path: str, body: httpx.SyncByteStream, nbytes: int, *, wait_s: float = 0.0) -> dict[str, Any]:
        """Send a file of `nbytes` and return the JSON answer.

        Raises:
            FarstepError: the problem the server answered with, or an answer that is not of the protocol.
            httpx.TransportError: no complete answer came.
        """
        request = self._request("PUT", path, None, wait_s)
        request.headers["content-type"] = FILE
        request.headers["content-length"] = str(nbytes)
        request.stream = body
        response = self._transport.handle_request(request)
        response.request = request
        try:
            response.read()
            if not response.is_success:
                raise self._problem(response)
            return cast("dict[str, Any]", response.json())
        except ValueError as exc:
            raise self._foreign(response) from exc
        finally:
            response.close()

    def _request(self, method: str, path: str, body: Pieces | Supply | None, wait_s: float) -> httpx.Request:
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = self._client.build_request(method, path).url
        headers = self._client.headers.copy()
        if body is not None:
            headers["content-type"] = MSGPACK
            headers["content-length"] = str(body.nbytes)
        return httpx.Request(method, url, headers=headers, stream=body, extensions=self._extensions(wait_s))

    def close(self) -> None:
        """Close every connection."""
        self._client.close()

    def _problem(self, response: httpx.Response) -> FarstepError:
        """Return the error that an answer other than 2xx stands for."""
        try:
            document = response.json()
        except ValueError:
            document = None
        if isinstance(document, dict) and "code" in document:
            return from_problem(document, response.status_code)
        if response.status_code == 401:
            return Unauthorized(f"{self.server} asks for credentials.", remedy="Give token=... or set FARSTEP_TOKEN.")
        if response.status_code in FROM_PROXIES:
            return Unavailable(f"a proxy answered {response.status_code} in the server's place", side="client")
        return self._foreign(response)

    def _foreign(self, response: httpx.Response) -> InvalidRequest:
        return InvalidRequest(
            f"{self.server} does not answer as a farstep server does: it said {response.status_code} to "
            f"{response.url.path}.",
            remedy="Check that the URL is a farstep server's and that no proxy answers in its place.",
            side="client",
        )


def _message(header: Mapping[str, Any], payload: Payload) -> Pieces | Supply:
    if not isinstance(payload, Supply):
        return Pieces(encode(header, payload, side="client"))
    packed = pack_header(header, side="client")
    return Supply(partial(_framed, packed, payload), encoded_size(len(packed), payload.nbytes))


def _framed(packed: bytes, payload: Payload) -> Generator[Batch]:
    frames = Frames(nbytes_of(payload))
    first = [packed]
    with closing(batches_of(payload)) as batches:
        for batch in batches:
            yield [*first, *frames.cut(map(memoryview, batch))]
            first = []
    yield first
