"""The physical limit: N bytes there and N bytes back over loopback TCP, between two processes.

`sendall` from memory that exists, `recv_into` into memory that exists, nothing around the bytes: neither side reads or
changes them, and the sizes are agreed on beforehand. Whatever moves tensors over a socket takes at least this long.

    python -m tests.benchmarks.peers.raw_sockets 10240 100000000
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from statistics import median

PATIENCE_S = 60.0
"""Longest wait for a single byte; a side whose other side is gone ends by itself."""

_ORDER = struct.Struct("<QQ")


def measure(sizes: Sequence[int], rounds: int) -> list[float]:
    """Return the median seconds of a round trip for each size.

    Args:
        sizes: bytes there, and as many back.
        rounds: timed round trips of each size; one more goes before them.
    """
    return [median(each) for each in measure_all(sizes, rounds)]


def measure_all(sizes: Sequence[int], rounds: int) -> list[list[float]]:
    """Return the seconds of every timed round trip, a list for each size."""
    with _echo() as port, socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return [_round_trips(connection, size, rounds) for size in sizes]


def _round_trips(connection: socket.socket, size: int, rounds: int) -> list[float]:
    outgoing, incoming = memoryview(bytearray(b"\x5a" * size)), memoryview(bytearray(size))
    connection.sendall(_ORDER.pack(size, rounds + 1))
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        connection.sendall(outgoing)
        _receive(connection, incoming)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _receive(connection: socket.socket, view: memoryview) -> None:
    while len(view):
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the other side has ended")
        view = view[count:]


@contextlib.contextmanager
def _echo() -> Iterator[int]:
    """Run the other side in a process of its own and give its port."""
    command = [sys.executable, __file__, "--echo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def _serve() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_S)
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(PATIENCE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while order := connection.recv(_ORDER.size, socket.MSG_WAITALL):
            size, rounds = _ORDER.unpack(order)
            outgoing, incoming = memoryview(bytearray(b"\xa5" * size)), memoryview(bytearray(size))
            for _ in range(rounds):
                _receive(connection, incoming)
                connection.sendall(outgoing)


def main() -> None:
    """Print the figures of the sizes on the command line."""
    if sys.argv[1:] == ["--echo"]:
        return _serve()
    sizes = [int(each) for each in sys.argv[1:]] or [10_240, 1_000_000, 100_000_000]
    for size, seconds in zip(sizes, measure(sizes, 20), strict=True):
        print(f"{size:>12,} bytes there and back  {seconds * 1e3:8.3f} ms")


if __name__ == "__main__":
    main()
