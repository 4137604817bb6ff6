"""Worker processes that share a session and step at the same time, for benchmarks of a server that many use.

Each joins, takes two steps so that all is warm, and says so; when all have, they are told to go and step without pause.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

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


class Crowd:
    """Hold workers that are warm and wait for the word."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes
        for each in processes:
            if (said := _line(each)) != "ready":
                raise RuntimeError(f"a worker did not get ready: {said!r}")

    def go(self) -> Done:
        """Let all step, and wait for the last one."""
        began = time.perf_counter()
        for each in self._processes:
            _pipe(each.stdin).write("go\n")
            _pipe(each.stdin).flush()
        steps_s = [json.loads(_line(each)) for each in self._processes]
        return Done(time.perf_counter() - began, steps_s)


@contextmanager
def crowd(task: Task) -> Iterator[Crowd]:
    """Start the workers of a task; they are gone at the end of the block."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with ExitStack() as stack:
        processes = []
        for number in range(task.workers):
            command = [sys.executable, __file__, json.dumps(asdict(task)), str(number)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=surroundings
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield Crowd(processes)


def cpu_s(pid: int) -> float:
    """Return the processor seconds that a process has used, all its threads together."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def _line(process: subprocess.Popen[str]) -> str:
    return _pipe(process.stdout).readline().strip()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


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
    sys.path.insert(0, str(ROOT))
    _work(Task(**json.loads(sys.argv[1])), int(sys.argv[2]))
