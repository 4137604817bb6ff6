"""One exchange over loopback with each HTTP client that farstep could be built on, beside bare sockets.

    python tests/benchmarks/bench_transport.py [--rounds 60]

A body goes there and one of the same size comes back into memory that is there, over one kept connection. The server is
a process that receives into memory and sends from it, and looks at no more of a request than its length. Sides take
turns in an order drawn anew for each round; medians in milliseconds. `pieces` is a body of 60 buffers, as a model's
gradients are.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import itertools

import httpcore
import httpx

from farstep.transport import BufferedBody, Route, SocketTransport, body_of
from tests.benchmarks.hardware import hardware

SIZES = (25_000_000, 1_000_000, 10_000)
PIECES, WARM_UP = 60, 3
END = b"\r\n\r\n"
Readinto = Callable[[memoryview], int]


def serve(listener: socket.socket, nbytes: int) -> None:
    """Answer requests with a body of `nbytes` by as many, on every connection."""
    while True:
        own, _ = listener.accept()
        threading.Thread(target=answer, args=(own, nbytes), daemon=True).start()


def answer(own: socket.socket, nbytes: int) -> None:
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    into, body = memoryview(bytearray(nbytes + 65536)), memoryview(bytearray(nbytes))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n" % nbytes
    while True:
        received, stop = 0, -1
        while stop < 0 or received < stop + len(END) + nbytes:
            count = own.recv_into(into[received:])
            if not count:
                return
            received += count
            stop = bytes(into[: min(received, 4096)]).find(END) if stop < 0 else stop
        own.sendall(head + body[:65536])
        own.sendall(body[65536:])


@contextmanager
def serving(nbytes: int) -> Iterator[int]:
    """Run the server; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("fork").Process(target=serve, args=(listener, nbytes), daemon=True)
        process.start()
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            process.join()


def sides(port: int, nbytes: int) -> Mapping[str, Callable[[], None]]:
    """Return one exchange for each client."""
    url, body, into = f"http://127.0.0.1:{port}/", bytes(nbytes), memoryview(bytearray(nbytes))
    whole, length = memoryview(body), {"Content-Length": str(nbytes)}
    cuts = [index * nbytes // PIECES for index in range(PIECES + 1)]
    pieces = [whole[first:last] for first, last in itertools.pairwise(cuts)]
    raw = socket.create_connection(("127.0.0.1", port))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ours, client = SocketTransport(), httpx.Client(transport=SocketTransport(), timeout=60)
    route = Route(httpx.Request("POST", url, headers=length))
    standard = http.client.HTTPConnection("127.0.0.1", port)
    plain, core = httpx.Client(trust_env=False, timeout=60), httpcore.ConnectionPool()

    def fill(readinto: Readinto, at: int = 0) -> None:
        while at < nbytes:
            count = readinto(into[at:])
            assert count
            at += count

    def collect(chunks: Iterator[bytes]) -> None:
        at = 0
        for chunk in chunks:
            into[at : at + len(chunk)] = chunk
            at += len(chunk)
        assert at == nbytes

    def over_sockets() -> None:
        raw.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % nbytes)
        raw.sendall(whole)
        head = b""
        while END not in head:
            head += raw.recv(256)
        rest = head.partition(END)[2]
        into[: len(rest)] = rest
        fill(raw.recv_into, len(rest))

    def farstep(buffers: list[memoryview]) -> None:
        found = ours.ask(route, BufferedBody(buffers))
        fill(found.body.readinto)
        found.close()

    def through_httpx() -> None:
        with client.stream("POST", url, content=BufferedBody([whole]), headers=length) as found:
            fill(body_of(found).readinto)

    def stdlib(sent: memoryview | Iterator[memoryview]) -> None:
        standard.request("POST", "/", body=sent, headers=length)
        found = standard.getresponse()
        fill(found.readinto)
        found.read()

    def over_httpcore() -> None:
        with core.stream("POST", url, content=body) as found:
            collect(found.iter_stream())

    def over_httpx() -> None:
        with plain.stream("POST", url, content=body) as found:
            collect(found.iter_raw())

    return {
        "sockets": over_sockets,
        "farstep": lambda: farstep([whole]),
        "farstep, pieces": lambda: farstep(pieces),
        "farstep, through httpx": through_httpx,
        "http.client": lambda: stdlib(whole),
        "http.client, pieces": lambda: stdlib(iter(pieces)),
        "httpcore": over_httpcore,
        "httpx": over_httpx,
    }


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="how often the sides take turns with large bodies")
    rounds = parser.parse_args().rounds
    print(f"{hardware()}; httpx {httpx.__version__}, httpcore {httpcore.__version__}")
    for nbytes in SIZES:
        with serving(nbytes) as port:
            work = sides(port, nbytes)
            found: dict[str, list[float]] = {name: [] for name in work}
            for number in range(WARM_UP + rounds * (1 if nbytes > 1_000_000 else 10)):
                for name in random.sample(list(work), len(work)):
                    taken = timed(work[name])
                    if number >= WARM_UP:
                        found[name].append(taken)
        print(f"{nbytes:>12,} bytes  " + "  ".join(f"{name} {median(times):.2f}" for name, times in found.items()))


if __name__ == "__main__":
    main()
