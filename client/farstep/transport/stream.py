"""A connected socket that never blocks inside a call, plain or encrypted.

    Stream              send(window), receive_into(view), wait(events)
    ├── PlainStream         gathers many buffers in one sendmsg
    └── TlsStream        TLS: one buffer after the other, in records of 16 KiB

Waiting is a separate step because a client that is sending has to notice an answer: a server that refuses a body
answers at once, and then closes.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import ceil
from typing import Final, final

READ: Final = 1
WRITE: Final = 4

MAX_BUFFERS: Final = 1 if sys.platform == "win32" else min(os.sysconf("SC_IOV_MAX"), 1024)
"""The number of buffers that one system call takes."""

_RECORD_BYTES: Final = 16384
_SECURE_SLICE_BYTES: Final = 1 << 20


class Stream(ABC):
    """Move bytes over a socket as far as possible without waiting.

    Attributes:
        blocked_on: `READ` or `WRITE`: what to wait for after a call that moved nothing.
    """

    blocked_on: int = WRITE

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._poll = None if sys.platform == "win32" else select.poll()

    @abstractmethod
    def send(self, window: Sequence[memoryview]) -> int:
        """Send from the front of `window` and return how many bytes; 0 means wait for `blocked_on`.

        Raises:
            OSError: the connection is broken.
        """

    @abstractmethod
    def receive_into(self, view: memoryview) -> int | None:
        """Receive into `view` and return how many bytes: 0 at the end, None for wait for `blocked_on`.

        Raises:
            OSError: the connection is broken.
        """

    def wait(self, events: int, timeout_s: float | None) -> int:
        """Return which of `events` (or others: a broken connection) happened; 0 when `timeout_s` passed first."""
        if self._poll is None:
            readers, writers = [self._sock] if events & READ else [], [self._sock] if events & WRITE else []
            readable, writable, broken = select.select(readers, writers, writers, timeout_s)
            return (READ if readable else 0) | (WRITE if writable or broken else 0)
        self._poll.register(self._sock, events)
        ready = self._poll.poll(None if timeout_s is None else ceil(timeout_s * 1000))
        return ready[0][1] if ready else 0

    def interrupt(self) -> None:
        """Shut the connection down in both directions, which wakes a thread that waits for it."""
        try:
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # SSLSocket's own would turn TLS off for that thread
        except OSError:
            return

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


@final
class PlainStream(Stream):
    """Send and receive over TCP or another stream socket."""

    def send(self, window: Sequence[memoryview]) -> int:
        self.blocked_on = WRITE
        try:
            if sys.platform == "win32":
                return self._sock.send(window[0])
            return self._sock.sendmsg(window)
        except BlockingIOError:
            return 0

    def receive_into(self, view: memoryview) -> int | None:
        self.blocked_on = READ
        try:
            return self._sock.recv_into(view)
        except BlockingIOError:
            return None


@final
class TlsStream(Stream):
    """Send and receive over TLS."""

    def send(self, window: Sequence[memoryview]) -> int:
        if len(window) > 1 and len(window[0]) < _RECORD_BYTES:
            data = _one_record(window)
        else:
            data = window[0][:_SECURE_SLICE_BYTES]
        try:
            return self._sock.send(data)
        except ssl.SSLWantWriteError:
            self.blocked_on = WRITE
        except ssl.SSLWantReadError:
            self.blocked_on = READ
        return 0

    def receive_into(self, view: memoryview) -> int | None:
        received = 0
        try:
            while received < len(view):
                got = self._sock.recv_into(view[received:])
                received += got
                if not got:
                    return received
        except ssl.SSLWantReadError:
            self.blocked_on = READ
        except ssl.SSLWantWriteError:
            self.blocked_on = WRITE
        except OSError:
            if not received:
                raise
        return received or (None if len(view) else 0)


def _one_record(window: Sequence[memoryview]) -> memoryview:
    """Join the small buffers at the front: a TLS record and a packet for each would cost more than the copy."""
    joined = bytearray()
    for view in window:
        joined += view[: _RECORD_BYTES - len(joined)]
        if len(joined) == _RECORD_BYTES:
            break
    return memoryview(joined)
