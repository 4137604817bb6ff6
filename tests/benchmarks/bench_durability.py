"""What it costs to keep a session on disk, and how long it takes to come back.

    make bench ARGS="--rows durability"        or        python tests/benchmarks/bench_durability.py [--quick]

Steps: Adagrad over TCP loopback against one server with a data directory; sessions of all levels take turns, block by
block, so that a machine whose speed drifts favours none. `the disk` is a file of as many bytes, written into mapped
memory that was there before and synced, as the journal does it.

Coming back: a server that was killed with SIGKILL, from its start to the first answer that only a session that is back
can give.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import farstep
from farstep.conversation import Conversation
from farstep.protocol.durability import Durability
from tests.benchmarks.hardware import hardware
from tests.benchmarks.peers.torch_rpc import Size
from tests.benchmarks.rows import Row, plain, within
from tests.benchmarks.sides import Work, parameters_of
from tests.support.service.servers import running_server

LEVELS: Mapping[str, Durability] = {
    "none": "none",
    "snapshot": farstep.Snapshot(),
    "os": farstep.Journal(sync="os"),
    "group": farstep.Journal(sync="group"),
    "always": farstep.Journal(sync="always"),
}
WORKS = (Work(Size(25_000_000, 56), 4), Work(Size(250_000, 60), 60))
LIMITS = {"snapshot": 1.035, "os": 1.05}
DISK_LIMIT = 1.1
"""How much more than the time without a journal and that of the disk a synced step may take."""


@contextmanager
def _directory() -> Iterator[str]:
    """Make a directory on a disk: where temporary files are may be memory."""
    with TemporaryDirectory(dir=os.environ.get("FARSTEP_BENCH_DIR")) as directory:
        yield directory


def measure(*, quick: bool) -> Sequence[Row]:
    """Return the rows of all levels and recoveries."""
    rows: list[Row] = []
    for work in WORKS:
        rows += _rows(work, _steps(work, 3 if quick else 8))
    rows += _recoveries(quick=quick)
    return rows


def _steps(work: Work, blocks: int) -> dict[str, float]:
    """Return the median milliseconds of a step at each level, and of the disk for its bytes."""
    seconds: dict[str, list[float]] = {name: [] for name in (*LEVELS, "disk")}
    with ExitStack() as stack:
        directory = stack.enter_context(_directory())
        server = stack.enter_context(running_server("--data-dir", f"{directory}/data"))
        optimizers = {}
        for name, level in LEVELS.items():
            optimizer = farstep.optim.Adagrad(
                parameters_of(work.size), server=server.url, kernel="fused", session=name, durability=level
            )
            optimizers[name] = stack.enter_context(_closing(optimizer))
        disk = stack.enter_context(_Disk.of(Path(directory) / "disk", 4 * work.size.parameters))
        for optimizer in optimizers.values():
            for _ in range(max(2, work.rounds // 3)):
                optimizer.step()
        for _ in range(blocks):
            for name, optimizer in optimizers.items():
                for _ in range(work.rounds):
                    began = time.perf_counter()
                    optimizer.step()
                    seconds[name].append(time.perf_counter() - began)
            for _ in range(min(work.rounds, 10)):
                seconds["disk"].append(disk.write())
    return {name: 1e3 * median(each) for name, each in seconds.items()}


@contextmanager
def _closing(optimizer: farstep.optim.Adagrad) -> Iterator[farstep.optim.Adagrad]:
    try:
        yield optimizer
    finally:
        optimizer.close()


class _Disk:
    """A file that is written and synced again and again."""

    def __init__(self, file: int, nbytes: int) -> None:
        self._file = file
        self._memory = torch.frombuffer(mmap.mmap(file, nbytes), dtype=torch.uint8)
        self._source = torch.zeros(nbytes, dtype=torch.uint8)

    @classmethod
    @contextmanager
    def of(cls, path: Path, nbytes: int) -> Iterator[_Disk]:
        """Make the file."""
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(file, 0, nbytes)
        try:
            yield cls(file, nbytes)
        finally:
            os.close(file)

    def write(self) -> float:
        """Write it and return the seconds of the sync alone."""
        self._memory.copy_(self._source)
        began = time.perf_counter()
        os.fdatasync(self._file)
        return time.perf_counter() - began


def _rows(work: Work, ms: Mapping[str, float]) -> Iterator[Row]:
    for name in LEVELS:
        if name == "none":
            continue
        kept = f"{work.label}, TCP, {'journal:' if name not in LIMITS or name == 'os' else ''}{name}"
        if name in LIMITS:
            yield within(kept, ms[name], "ms", "none", ms["none"], LIMITS[name])
        else:
            yield within(kept, ms[name], "ms", "none and the disk", ms["none"] + ms["disk"], DISK_LIMIT)


def _recoveries(*, quick: bool) -> Iterator[Row]:
    small, target = 100 if quick else 1000, "the target"
    seconds, started = _small_sessions(small)
    yield within(
        f"{small} small sessions back, a server's start of {started:.1f} s included", seconds, "s", target, 3, 1
    )
    seconds, started = _one_session(Size(12_500_000, 56), 8)
    what = f"first good step of a 100 MB session, killed after 8, a server's start of {started:.1f} s included"
    yield within(what, seconds, "s", target, 3, 1)
    if not quick:
        seconds, started = _one_session(Size(125_000_000, 56), 20)
        what = f"first good step of a 1 GB session, killed after 20, a server's start of {started:.1f} s included"
        yield within(what, seconds, "s", target, 5, 1)


def _one_session(size: Size, steps: int) -> tuple[float, float]:
    """Return the seconds from a kill to the end of the next step, and those of the server's start among them."""
    with _directory() as directory, running_server("--data-dir", f"{directory}/data") as server:
        optimizer = farstep.optim.Adagrad(parameters_of(size), server=server.url, kernel="fused", session="a")
        with _closing(optimizer):
            for _ in range(steps):
                optimizer.step()
            server.kill()
            began = time.perf_counter()
            server.restart()
            started = time.perf_counter() - began
            optimizer.step()
            return time.perf_counter() - began, started


def _small_sessions(count: int) -> tuple[float, float]:
    """Return the seconds from a kill until many sessions are back, and those of the server's start among them."""
    with _directory() as directory, running_server("--data-dir", f"{directory}/data") as server:
        for number in range(count):
            parameter = torch.nn.Parameter(torch.ones(16))
            parameter.grad = torch.ones(16)
            with _closing(farstep.optim.Adagrad([parameter], server=server.url, session=f"s{number}")) as optimizer:
                optimizer.step()
        server.kill()
        began = time.perf_counter()
        server.restart()
        started = time.perf_counter() - began
        conversation = Conversation(server.url, None)
        try:
            while conversation.control("GET", "/v1/info")["sessions"] < count:
                time.sleep(0.01)
        finally:
            conversation.close()
        return time.perf_counter() - began, started


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    torch.set_num_threads(1)
    print(f"{hardware()}\n\n{plain(measure(quick=parser.parse_args(arguments).quick))}")


if __name__ == "__main__":
    main()
