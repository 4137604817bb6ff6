"""One connection and the exchange that is going on over it: a request out, a head in, a body in.

Heads and small bodies arrive in a scratch buffer of 64 KiB in one read; larger bodies go from the socket into the
memory the caller gives. While a request is being sent the connection listens: an answer of 400 and above ends the
sending (RFC 9112 section 9.5), a lower one waits until the request is complete.

Failures are the exceptions of httpx, so that `except httpx.ReadTimeout` works as with any other transport.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import httpx

from farstep.transport.forks import this
from farstep.transport.head import (
    DEADLINE_S,
    END,
    MAX_HEAD_BYTES,
    MalformedAnswer,
    OversizedAnswer,
    ResponseHead,
    response_head,
)
from farstep.transport.pieces import Cursor
from farstep.transport.stream import MAX_BUFFERS, READ, Stream

_MAX_INTERIM_ANSWERS: Final = 16
SLOWEST_BYTES_PER_S: Final = 16 * 1024
"""How fast an answer has to come at least, from its first byte on, beyond the time that a single read may take."""


@final
@dataclass(frozen=True, slots=True)
class Timeouts:
    """Say how long an exchange may take; None means without end.

    Attributes:
        connect_s: seconds for opening a connection, with TLS.
        read_s: seconds without a byte from the server.
        write_s: seconds without room for a byte to the server.
        until: the moment of `time.monotonic` when all of it has to be over.
    """

    connect_s: float | None
    read_s: float | None
    write_s: float | None
    until: float | None

    @classmethod
    def of(cls, extensions: Mapping[str, Any]) -> Timeouts:
        """Return the timeouts a request's extensions state."""
        timeout: Mapping[str, float | None] = extensions.get("timeout", {})
        deadline_s: float | None = extensions.get(DEADLINE_S)
        until = None if deadline_s is None else time.monotonic() + deadline_s
        return cls(timeout.get("connect"), timeout.get("read"), timeout.get("write"), until)

    def left(self, limit_s: float | None) -> float | None:
        """Return the seconds to wait for something whose own limit is `limit_s`."""
        if self.until is None:
            return limit_s
        rest_s = max(self.until - time.monotonic(), 0.0)
        return rest_s if limit_s is None else min(limit_s, rest_s)

    def passed(self) -> bool:
        """Tell whether all of it should be over; a server that always has one more byte is never waited for."""
        return self.until is not None and time.monotonic() >= self.until


@final
class Connection:
    """Carry one exchange at a time over a link.

    Attributes:
        closed: the link is gone.
        heard: the server has sent something in this exchange.
        idle_since: when the exchange before this one ended, by `time.monotonic`.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._process = this.process
        self._memory = bytearray(MAX_HEAD_BYTES)
        self._scratch = memoryview(self._memory)
        self._start = self._end = 0
        self._interim = 0
        self._sending = False
        self._answer: ResponseHead | None = None
        self._method = ""
        self._timeouts = Timeouts(None, None, None, None)
        self._came_since: float | None = None
        self._came_bytes = 0
        self.closed = False
        self.heard = False
        self.idle_since = 0.0

    def begin(self, method: str, timeouts: Timeouts) -> None:
        """Start an exchange."""
        self._method, self._timeouts = method, timeouts
        self._interim, self._answer, self.heard, self._sending = 0, None, False, False
        self._came_since, self._came_bytes = None, 0

    def quiet(self) -> bool:
        """Return whether an idle connection is still usable: open, this process's and without unread bytes."""
        mine = not self.closed and self._process is this.process
        return mine and self._start == self._end and not self._stream.wait(READ, 0)

    def send(self, views: Iterable[memoryview]) -> bool:
        """Send the next buffers of an exchange and return True, or False when the server's refusal ended it.

        Raises:
            httpx.WriteTimeout: there was no room for a byte in time.
            httpx.WriteError: the connection broke, and no answer was there to read.
        """
        if self._process is not this.process:
            raise self._forked()
        listening = self._answer is None
        if self._sending and listening and self._stream.wait(READ, 0):  # while these buffers were made
            listening = self._listen()
            if self._refused():
                return False
        self._sending = True
        cursor = Cursor(views, MAX_BUFFERS)
        while window := cursor.window():
            if self._timeouts.until is not None and self._timeouts.passed():
                raise httpx.WriteTimeout("The request's deadline passed while it was being sent.")
            try:
                sent = self._stream.send(window)
            except OSError as exc:
                if self._answered():
                    return False
                raise httpx.WriteError(f"The connection broke while sending: {exc}") from exc
            if sent:
                left = cursor.advance(sent)
                ready = self._stream.wait(READ, 0) if listening and left else 0
            else:
                events = self._stream.blocked_on | (READ if listening else 0)
                ready = self._stream.wait(events, self._timeouts.left(self._timeouts.write_s))
                if not ready:
                    raise httpx.WriteTimeout("The server did not take the request's next byte in time.")
            if listening and ready & READ:
                listening = self._listen()
                if self._refused():
                    return False
        return True

    def answer(self) -> ResponseHead:
        """Return the head of the final answer, reading as much as that needs.

        Raises:
            httpx.ReadTimeout: it did not come in time.
            httpx.ReadError: the connection broke.
            httpx.RemoteProtocolError: the server hung up instead.
            MalformedAnswer: what it sent is not HTTP/1.1.
        """
        soon = self.heard  # the first of it is never there yet
        while self._answer is None:
            self._answer = self._parse()
            if self._answer is None and not self._fill(soon=soon):
                raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        return self._answer

    def read_into(self, view: memoryview) -> int:
        """Read at least one byte of a body into `view` and return how many; 0 when the server has hung up.

        Raises:
            httpx.ReadTimeout: none came in time.
            httpx.ReadError: the connection broke.
        """
        ready = self._end - self._start
        if not ready:
            return self._receive_into(view)
        taken = min(ready, len(view))
        view[:taken] = self._scratch[self._start : self._start + taken]
        self._start += taken
        return taken

    def arrived(self) -> memoryview:
        """Return what has arrived and was not read, where it lies until the next read."""
        return self._scratch[self._start : self._end]

    def skip(self, count: int) -> None:
        """Count so many bytes of what has arrived as read."""
        self._start += count

    def read_line(self) -> bytes:
        """Return the next line without its line break.

        Raises:
            httpx.RemoteProtocolError: there is none.
            OversizedAnswer: it is longer than a head may be.
            httpx.ReadTimeout, httpx.ReadError: as `read_into`.
        """
        while (stop := self._memory.find(b"\r\n", self._start, self._end)) < 0:
            if not self._fill():
                raise httpx.RemoteProtocolError("peer closed connection without sending complete message body.")
        line = bytes(self._scratch[self._start : stop])
        self._start = stop + 2
        return line

    def interrupt(self) -> None:
        """End the connection under a thread that is using it; that thread gets an error."""
        self.closed = True
        if self._process is this.process:
            self._stream.interrupt()

    def close(self) -> None:
        """Close the connection; another process that has it too does not notice."""
        self.closed = True
        self._stream.close()

    def _forked(self) -> httpx.ReadError:
        return httpx.ReadError("This connection belongs to the process that opened it, not to its fork.")

    def _parse(self) -> ResponseHead | None:
        while (stop := self._memory.find(END, self._start, self._end)) >= 0:
            head = response_head(bytes(self._scratch[self._start : stop]), self._method)
            self._start = stop + len(END)
            if head.status >= 200 or head.status == 101:
                return head
            self._interim += 1
            if self._interim > _MAX_INTERIM_ANSWERS:
                raise MalformedAnswer("The server keeps sending interim answers (1xx).")
        return None

    def _listen(self) -> bool:
        """Take in what the server says while we send, and tell whether to go on listening."""
        try:
            got = self._stream.receive_into(self._room())
        except OSError:
            return False  # the next send fails too, and then reads what is there
        if got is not None:
            self._received(got)
            self._answer = self._parse()
        return got != 0 and self._answer is None

    def _refused(self) -> bool:
        return self._answer is not None and self._answer.status >= 400

    def _answered(self) -> bool:
        """Tell whether an answer had arrived before sending failed."""
        while self._answer is None and self._listen():
            if not self._stream.wait(READ, 0):
                break
        return self._answer is not None

    def _room(self) -> memoryview:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._scratch):
            if not self._start:
                raise OversizedAnswer(f"The server sent a head or line above {MAX_HEAD_BYTES} bytes.")
            held = self._end - self._start
            self._scratch[:held] = self._scratch[self._start : self._end]
            self._start, self._end = 0, held
        return self._scratch[self._end :]

    def _received(self, count: int) -> None:
        self._end += count
        self.heard = self.heard or count > 0

    def _fill(self, *, soon: bool = True) -> int:
        got = self._receive_into(self._room(), soon=soon)
        self._received(got)
        return got

    def _receive_into(self, view: memoryview, *, soon: bool = True) -> int:
        """Receive at least one byte; look for it before waiting where it should be there soon."""
        if self._process is not this.process:
            raise self._forked()
        while True:
            if self._timeouts.until is not None and self._timeouts.passed():
                raise httpx.ReadTimeout("The request's deadline passed before its answer was complete.")
            try:
                got = self._stream.receive_into(view) if soon else None
            except OSError as exc:
                raise httpx.ReadError(f"The connection broke while reading: {exc}") from exc
            if got is not None:
                if self._came_since is None:
                    self._came_since = time.monotonic()
                self._came_bytes += got  # what came while a request was sent does not count
                return got
            if self._came_since is not None and self._too_slow(self._came_since):
                raise httpx.ReadTimeout(f"The answer came more slowly than {SLOWEST_BYTES_PER_S} bytes per second.")
            events, soon = (self._stream.blocked_on if soon else READ), True
            if not self._stream.wait(events, self._timeouts.left(self._timeouts.read_s)):
                raise httpx.ReadTimeout("The server sent nothing in time.")

    def _too_slow(self, since: float) -> bool:
        """Return whether an answer trickles: a byte now and then would keep any limit for a single read."""
        if self._timeouts.read_s is None:
            return False
        allowed_s = self._timeouts.read_s + self._came_bytes / SLOWEST_BYTES_PER_S
        return time.monotonic() - since > allowed_s
