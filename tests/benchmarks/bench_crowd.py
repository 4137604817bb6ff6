"""What each of many workers costs a server: 10, 100 and 1,000 in one session, and as many sessions of one worker.

    python tests/benchmarks/bench_crowd.py                         # [--cycles 3] [--markdown FILE]

Workers are connections of one load process, each of which pushes small gradients without pause and waits for its
answer; the server is a process of its own, another one for each row. Columns:

    errors        answers that were refusals
    p50, p99      of a push, with everybody pushing at once: it waits for its turn behind all others
    CPU a push    processor time of the server for each push
    pushes/s      answered in a second, by a load process that shares the cores
    memory        what the server grew by for each worker (or session), joined and with a first push behind it

Target: no error, and CPU a push at 1,000 within 20 % of that at 10.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import msgpack
import torch

from farstep.protocol import encode
from tests.benchmarks.crowd import cpu_s
from tests.benchmarks.hardware import hardware
from tests.support.service.raw import payload_of, session_document
from tests.support.service.servers import RunningServer, running_server

COUNTS = (10, 100, 1_000)
PUSHES = 6_000
"""Of all workers of a row together, beside one each before the clock starts."""
SHAPES = ((16, 16), (16,))
AT_ONCE = 64
"""Joins under way at a time."""


class Row(NamedTuple):
    """State what one row came to in one cycle."""

    errors: int
    p50_s: float
    p99_s: float
    cpu_s: float
    per_s: float
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class Kind:
    """State who shares what.

    Attributes:
        name: what it is called.
        shared: whether all workers are in one session, or each is alone in its own.
        sync: whether a step is one push of each worker.
    """

    name: str
    shared: bool
    sync: bool = False


KINDS = (Kind("workers, async", True), Kind("workers, sync", True, True), Kind("sessions", False))


class Worker:
    """One connection, and what is pushed through it."""

    def __init__(self, session: str, name: str, mode: dict[str, Any]) -> None:
        self._parameters = [torch.zeros(shape) for shape in SHAPES]
        self._gradients = payload_of([torch.ones(shape) for shape in SHAPES])
        self._session, self._name, self._mode = session, name, mode
        self._sequence = self._version = 0
        self.errors = 0
        self.seconds: list[float] = []

    async def join(self, port: int) -> None:
        """Open the connection, join the session, and give it first parameters if it has none."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        document = session_document(self._session, self._name, self._parameters, consistency=self._mode)
        self._joined = json.loads(await self._ask("POST", "/v1/sessions", json.dumps(document).encode(), "json"))
        if self._joined["initialise"]:
            head = {"fields": ["param"], "initial": True, "version": 0}
            await self._write("PUT", "contents", head, payload_of(self._parameters))

    async def push(self, times: int) -> None:
        """Push again and again."""
        for _ in range(times):
            began = time.perf_counter()
            await self._write("POST", "push", {"base": self._version}, self._gradients)
            self.seconds.append(time.perf_counter() - began)

    def close(self) -> None:
        self._writer.close()

    async def _write(self, method: str, where: str, head: dict[str, Any], payload: Sequence[memoryview]) -> None:
        name = {"worker": self._name, "epoch": self._joined["epoch"], "seq": self._sequence + 1}
        header = {"v": 1, "incarnation": self._joined["incarnation"], **name, **head}
        body = b"".join(encode(header, payload))
        answer = await self._ask(method, f"/v1/sessions/{self._session}/{where}", body, "msgpack")
        if answer:
            unpacker = msgpack.Unpacker()
            unpacker.feed(answer)
            self._version = int(unpacker.unpack()["version"])
            self._sequence += 1

    async def _ask(self, method: str, path: str, body: bytes, kind: str) -> bytes:
        """Return the body of an answer, empty where it is an error."""
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/{kind}\r\n"
        self._writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = sum(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
        answer = await self._reader.readexactly(length)
        if b" 20" not in lines[0]:
            self.errors += 1
            return b""
        return answer


def measure(server: RunningServer, kind: Kind, count: int, cycle: int, *, pushes: int = PUSHES) -> Row:
    """Return what so many workers or sessions come to."""
    return asyncio.run(_measure(server, kind, count, cycle, pushes))


async def _measure(server: RunningServer, kind: Kind, count: int, cycle: int, pushes: int) -> Row:
    mode = {"mode": "sync", "workers": count, "deadline_s": 60.0} if kind.sync else {"mode": "async"}
    session = f"{kind.name.replace(', ', '-')}-{count}-{cycle}"
    names = [(session, f"w{number}") if kind.shared else (f"{session}-{number}", "w") for number in range(count)]
    workers = [Worker(session, name, mode) for session, name in names]
    before_bytes = resident_bytes(server.pid)
    await workers[0].join(server.port)
    for first in range(1, count, AT_ONCE):
        await asyncio.gather(*(each.join(server.port) for each in workers[first : first + AT_ONCE]))
    await asyncio.gather(*(each.push(1) for each in workers))
    memory_bytes = (resident_bytes(server.pid) - before_bytes) / count
    for each in workers:
        each.seconds.clear()
    used_s, began = cpu_s(server.pid), time.perf_counter()
    await asyncio.gather(*(each.push(pushes // count) for each in workers))
    wall_s, used_s = time.perf_counter() - began, cpu_s(server.pid) - used_s
    seconds = [each for worker in workers for each in worker.seconds]
    remove = {session for session, _ in names}
    for name in remove:
        await workers[0]._ask("DELETE", f"/v1/sessions/{name}", b"", "json")
    errors = sum(each.errors for each in workers)
    for each in workers:
        each.close()
    total = len(seconds)
    return Row(errors, median(seconds), quantiles(seconds, n=100)[98], used_s / total, total / wall_s, memory_bytes)


def resident_bytes(pid: int) -> int:
    """Return the memory that a process has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=3, help="how often the rows take turns; medians are printed")
    parser.add_argument("--pushes", type=int, default=PUSHES, metavar="N", help="of all workers of a row together")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    options = parser.parse_args(arguments)
    found: dict[tuple[Kind, int], list[Row]] = {(kind, count): [] for kind in KINDS for count in COUNTS}
    torch.set_num_threads(1)
    for cycle in range(options.cycles):
        for (kind, count), rows in found.items():
            with running_server("--max-sessions", "2000") as server:
                measure(server, KINDS[0], 10, -1, pushes=500)  # so that each row finds a server that is warm
                rows.append(measure(server, kind, count, cycle, pushes=options.pushes))
    lines = [f"{hardware()}", ""]
    lines += ["| | how many | errors | p50, ms | p99, ms | CPU a push, µs | to 10 | pushes/s | memory each, kB |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for (kind, count), rows in found.items():
        ours = Row(*(median(each) for each in zip(*rows, strict=True)))
        few_s = median(each.cpu_s for each in found[kind, COUNTS[0]])
        lines.append(
            f"| {kind.name} | {count:,} | {sum(each.errors for each in rows)} | {1e3 * ours.p50_s:.1f} "
            f"| {1e3 * ours.p99_s:.1f} | {1e6 * ours.cpu_s:.0f} | {ours.cpu_s / few_s:.2f} | {ours.per_s:,.0f} "
            f"| {ours.memory_bytes / 1e3:.1f} |"
        )
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
