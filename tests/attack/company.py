"""A good client beside an attack: how long its steps take, and what the server holds.

    quiet      the good client alone
    control    beside the same attack on a socket that reads and answers nothing: what the machine itself costs
    attacked   beside the attack on its server

A server without a deadline in some state fills up, and one that gives long turns makes a good client wait.
"""

from __future__ import annotations

import multiprocessing
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import quantiles

import torch

from farstep.optim import Adagrad
from tests.attack.connections import Held, hold
from tests.support.service.measured import Process
from tests.support.service.servers import TOKEN, RunningServer

PARAMETERS = 2_500
PROCESSES = multiprocessing.get_context("spawn")


@dataclass
class Company:
    """What a good client met.

    Attributes:
        quiet, control, attacked: seconds of each of its steps.
        taken_bytes: what the server's memory grew by, at most, while it was attacked.
        left_bytes: what of it was still taken afterwards.
        held: what came of each way to hold a connection.
    """

    quiet: list[float] = field(default_factory=list)
    control: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)
    taken_bytes: int = 0
    left_bytes: int = 0
    held: dict[str, Held] = field(default_factory=dict)


def p99_ms(seconds: list[float]) -> float:
    """Return the 99th percentile in milliseconds."""
    return 1e3 * quantiles(seconds, n=100)[98]


def attack(server: RunningServer, *, seconds: float, each: int, quiet_s: float = 20.0) -> Company:
    """Step a model beside an attack.

    Args:
        server: one that asks for `TOKEN`.
        seconds: how long the attack takes.
        each: connections at once, of each way to hold one.
        quiet_s: how long the good client steps without it, and beside the control.
    """
    result = Company()
    parameter = torch.nn.Parameter(torch.zeros(PARAMETERS))
    optimizer = Adagrad([parameter], lr=0.1, server=server.url, token=TOKEN, session="good", kernel="reference")
    parameter.grad = torch.ones(PARAMETERS)
    optimizer.step()
    result.quiet = _steps(optimizer, quiet_s)
    with _sink() as port, _attacking(port, quiet_s, each):
        result.control = _steps(optimizer, quiet_s)
    memory = Process(server)
    with _attacking(server.port, seconds, each) as held:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            result.attacked += _steps(optimizer, min(1.0, left))
            result.taken_bytes = max(result.taken_bytes, memory.taken)
        result.held = held()
    _steps(optimizer, 2.0)
    result.left_bytes = memory.taken
    optimizer.close()
    return result


def _steps(optimizer: torch.optim.Optimizer, seconds: float) -> list[float]:
    """Step for so long and return how long each step took."""
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        optimizer.step()
        taken.append(time.perf_counter() - began)
    return taken


@contextmanager
def _attacking(port: int, seconds: float, each: int) -> Iterator:
    """Hold connections from another process; yields what waits for its end and returns what came of it."""
    with PROCESSES.Pool(1) as pool:
        pending = pool.apply_async(hold, (port, seconds, each))
        yield lambda: pending.get(seconds + 60)


@contextmanager
def _sink() -> Iterator[int]:
    """Yield the port of a process that reads whatever comes and answers nothing."""
    ready, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_read, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ready.recv()
    finally:
        process.kill()
        process.join()


def _read(ready: multiprocessing.connection.Connection) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        ready.send(listener.getsockname()[1])
        while True:
            for key, _ in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                try:
                    read = sock.recv(1 << 20)
                except OSError:
                    read = b""
                if not read:
                    selector.unregister(sock)
                    sock.close()
