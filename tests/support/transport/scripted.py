"""A server that plays a script: for each connection a function that reads and writes as it likes."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Sequence

PATIENCE_S = 20.0
"""Longest wait for anything in these tests; whoever waits longer has found a hang."""


class Peer:
    """One connection, seen from the server.

    Attributes:
        over: set when the test has ended; a server that stalls waits for it.
    """

    def __init__(self, sock: socket.socket, over: threading.Event) -> None:
        self.sock = sock
        self.over = over
        self._file = sock.makefile("rb")

    def read_head(self) -> str:
        """Return the head of the next request, empty when there is none."""
        lines: list[bytes] = []
        while (line := self._file.readline()) not in (b"\r\n", b""):
            lines.append(line)
        return b"".join(lines).decode()

    def read_body(self, head: str) -> bytes:
        """Return as many bytes as the head announced."""
        length = next((line for line in head.lower().splitlines() if line.startswith("content-length")), "x: 0")
        return self._file.read(int(length.split(":")[1]))

    def read_rest(self) -> bytes:
        """Return everything until the client closes."""
        return self._file.read()

    def read_request(self) -> tuple[str, bytes]:
        """Return the head and the body of the next request."""
        head = self.read_head()
        return head, self.read_body(head)

    def send(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    def answer(self, body: bytes = b"ok", status: str = "200 OK", extra: str = "") -> None:
        self.send(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode(), body)

    def reset(self) -> None:
        """Close without farewell: the other side gets a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._file.close()
        self.sock.close()


Script = Callable[[Peer], None]


class Stage:
    """Listen on a port and play one script after the other, a connection each.

    Attributes:
        port: where it listens.
        url: the same as a URL.
    """

    def __init__(self, scripts: Sequence[Script], context: ssl.SSLContext | None) -> None:
        self._scripts = scripts
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE_S)
        self._over = threading.Event()
        self._failures: list[BaseException] = []
        self._played = 0
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._play, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop, and fail if a script failed or was never played."""
        self._over.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "a script hangs"
        self._listener.close()
        if self._failures:
            raise self._failures[0]
        assert self._played == len(self._scripts), "there were fewer connections than scripts"

    def _play(self) -> None:
        try:
            for script in self._scripts:
                sock = self._listener.accept()[0]
                self._played += 1
                sock.settimeout(PATIENCE_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a reset drops what waits to be sent
                if self._context is not None:
                    sock = self._context.wrap_socket(sock, server_side=True)
                peer = Peer(sock, self._over)
                try:
                    script(peer)
                finally:
                    peer.close()
        except BaseException as exc:
            self._failures.append(exc)
