"""A proxy that does to a connection what networks do: cut it anywhere, lose answers, fall silent, be away.

    with faulty(server.port) as network:
        optimizer = Adagrad(..., server=network.url)
        network.cut_request(after=100)     # the next request ends after 100 bytes, for both sides
        optimizer.step()

Faults are used up one by one, each by the next bytes that move in its direction. Nothing here waits for a clock.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

CHUNK_BYTES = 65536
Way = Literal["request", "response"]


@dataclass(slots=True)
class Fault:
    """Let `after` more bytes through one way, and then cut the connection, or say nothing more, or go down."""

    way: Way
    after: int
    silent: bool = False
    down: bool = False


class Network:
    """A proxy in front of a server on this machine.

    Args:
        to: the server's port; or the path of its socket, and the proxy is a socket beside it.

    Attributes:
        down: whether connections are refused and the open ones cut, until it is set to False again.
        moved: the bytes that have gone each way.
    """

    def __init__(self, to: int | str) -> None:
        self._to = to
        if isinstance(to, str):
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(f"{to}.p")
            self._listener.listen()
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
        self._wake, self._woken = socket.socketpair()
        self._faults: deque[Fault] = deque()
        self._pairs: dict[socket.socket, tuple[socket.socket, Way]] = {}
        self._silent: set[socket.socket] = set()
        self._stopped = False
        self._down = False
        self._lock = threading.Lock()
        self.moved: dict[Way, int] = {"request": 0, "response": 0}
        self._thread = threading.Thread(target=self._run, name="faulty-network")
        self._thread.start()

    @property
    def url(self) -> str:
        """Return where clients find it."""
        if isinstance(self._to, str):
            return f"unix://{self._listener.getsockname()}"
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut_request(self, *, after: int) -> None:
        """Cut the next request, for both sides, after so many bytes."""
        self._add(Fault("request", after))

    def cut_response(self, *, after: int, then_down: bool = False) -> None:
        """Cut the next response after so many bytes, although the server has sent it; then be down, if so asked."""
        self._add(Fault("response", after, down=then_down))

    def swallow_response(self) -> None:
        """Say nothing in place of the next response, and keep the connection open."""
        self._add(Fault("response", 0, silent=True))

    @property
    def down(self) -> bool:
        return self._down

    @down.setter
    def down(self, down: bool) -> None:
        with self._lock:
            self._down = down
            if down:
                self._cut_all()

    @property
    def faults_left(self) -> int:
        """Return how many faults have not happened yet."""
        return len(self._faults)

    def close(self) -> None:
        """End everything."""
        self._stopped = True
        self._wake.send(b"x")
        self._thread.join()
        for each in (*self._pairs, self._listener, self._wake, self._woken):
            each.close()
        if isinstance(self._to, str):
            os.unlink(f"{self._to}.p")

    def _add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            self._selector = selector
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._stopped:
                for key, _ in selector.select():
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    with self._lock:
                        if sock is self._listener:
                            self._accept()
                        elif sock in self._pairs:
                            self._move(sock)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self._down:
            client.close()
            return
        try:
            server = self._reach()
        except OSError:
            client.close()
            return
        self._pairs |= {client: (server, "request"), server: (client, "response")}
        for sock in (client, server):
            if not isinstance(self._to, str):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(sock, selectors.EVENT_READ)

    def _reach(self) -> socket.socket:
        if not isinstance(self._to, str):
            return socket.create_connection(("127.0.0.1", self._to))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self._to)
        except OSError:
            sock.close()
            raise
        return sock

    def _move(self, sock: socket.socket) -> None:
        other, way = self._pairs[sock]
        try:
            chunk = sock.recv(CHUNK_BYTES)
        except OSError:
            chunk = b""
        if not chunk:
            self._cut(sock)
            return
        if sock in self._silent:
            return
        fault = next((each for each in self._faults if each.way == way), None)
        passed = chunk if fault is None else chunk[: fault.after]
        # Whoever receives these bytes must find them counted.
        self.moved[way] += len(passed)
        if fault is not None:
            fault.after -= len(passed)
            if fault.after and len(passed) == len(chunk):
                fault = None
            else:
                self._faults.remove(fault)
        try:
            other.sendall(passed)
        except OSError:
            self._cut(sock)
        else:
            if fault is not None:
                self._strike(sock, fault)

    def _strike(self, sock: socket.socket, fault: Fault) -> None:
        if fault.silent:
            self._silent.add(sock)
        elif fault.down:
            self._down = True
            self._cut_all()
        else:
            self._cut(sock)

    def _cut_all(self) -> None:
        while self._pairs:
            self._cut(next(iter(self._pairs)))

    def _cut(self, sock: socket.socket) -> None:
        other, _ = self._pairs.pop(sock)
        del self._pairs[other]
        for each in (sock, other):
            self._silent.discard(each)
            with suppress(KeyError, ValueError):
                self._selector.unregister(each)
            each.close()


@contextmanager
def faulty(to: int | str) -> Iterator[Network]:
    """Put a network in front of a server on this machine, until the end of the block."""
    network = Network(to)
    try:
        yield network
    finally:
        network.close()
