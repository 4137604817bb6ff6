"""Worker processes that share a session and step at the same time, for benchmarks of a server that many use.

Each joins, takes two steps so that all is warm, and says so; when all have, they are told to go and step without pause.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

ROOT = Path(__file__).parents[2]
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Task:
    """State what each worker does.

    Attributes:
        url, session: where.
        workers: how many there are.
        sync: whether a step is one push of each of them.
        parameters, tensors: the model, float32.
        steps: how many each takes.
        kernel: which kernel runs them.
    """

    url: str
    session: str
    workers: int
    sync: bool
    parameters: int
    tensors: int
    steps: int
    kernel: Literal["fused", "reference"] = "fused"


@dataclass(frozen=True, slots=True)
class Done:
    """State how long all the steps of all workers took, and each of them."""

    wall_s: float
    steps_s: list[list[float]]


class Worker(Protocol):
    """Something that runs as a worker, and is spoken to in lines."""

    def tell(self, line: str) -> None:
        """Write a line to it."""

    def line(self) -> str:
        """Return its next line, "" if it has ended."""


Start = Callable[[str, Sequence[str], Mapping[str, str]], AbstractContextManager[Worker]]
"""Run a module with arguments and an environment until the end of a block."""


class Crowd:
    """Hold workers that are warm and wait for the word."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        for each in workers:
            if (said := each.line()) != "ready":
                raise RuntimeError(f"a worker did not get ready: {said!r}")

    def go(self) -> Done:
        """Let all step, and wait for the last one."""
        began = time.perf_counter()
        for each in self._workers:
            each.tell("go")
        steps_s = [json.loads(each.line()) for each in self._workers]
        return Done(time.perf_counter() - began, steps_s)


class Process:
    """A worker that is a process of Python."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def line(self) -> str:
        """Return the next line of its standard output."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def started(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[Process]:
    """Start a worker as a process of its own."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        try:
            yield Process(process)
        finally:
            process.kill()


@contextmanager
def crowd(task: Task, *, start: Start = started) -> Iterator[Crowd]:
    """Start the workers of a task; they are gone at the end of the block."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with ExitStack() as stack:
        numbers = [[json.dumps(asdict(task)), str(number)] for number in range(task.workers)]
        yield Crowd([stack.enter_context(start("tests.benchmarks.crowd", each, surroundings)) for each in numbers])


def cpu_s(pid: int) -> float:
    """Return the processor seconds that a process has used, all its threads together."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def _work(task: Task, number: int) -> None:
    import torch

    import farstep

    each, rest = divmod(task.parameters, task.tensors)
    parameters = []
    for place in range(task.tensors):
        parameter = torch.nn.Parameter(torch.zeros(each + (place < rest)))
        parameter.grad = torch.randn(parameter.shape)
        parameters.append(parameter)
    optimizer = farstep.optim.Adagrad(
        parameters,
        server=task.url,
        session=task.session,
        worker=f"w{number}",
        consistency=farstep.Sync(workers=task.workers) if task.sync else farstep.Async(),
        kernel=task.kernel,
    )
    for _ in range(WARM_UP):
        optimizer.step()
    print("ready", flush=True)
    sys.stdin.readline()
    seconds = []
    for _ in range(task.steps):
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds), flush=True)
    optimizer.close()


if __name__ == "__main__":
    _work(Task(**json.loads(sys.argv[1])), int(sys.argv[2]))
