"""A session in a local host, without a server, whose kernels stop where a test wants them to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from farstep.protocol.memory import tensor_memory
from farstep.protocol.messages import PushHead, PutHead, WriteName
from farstep_service.kernels.kernel import Call, Kernel, KernelSource, Progress
from farstep_service.kernels.reference import ReferenceKernel
from farstep_service.layout import SegmentSpec
from farstep_service.optimizers.rule import AnyRule, KernelName, KernelSignature
from farstep_service.plan import Plan
from farstep_service.session import Session
from farstep_service.sessions import Actor, Answer
from farstep_service.sessions.turns import INLINE_BYTES

SMALL, LARGE = 8, INLINE_BYTES // 2
"""Elements of parameters whose steps run on the event loop, and in a thread."""
ASYNC: dict[str, object] = {"mode": "async"}


class Gate(Kernel):
    """A reference kernel that tells when it has begun, waits to be let through, and may fail."""

    name = "reference"

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.open.set()
        self.threads: list[str] = []
        self.failure: Exception | None = None
        self.kernel: ReferenceKernel

    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        self.threads.append(threading.current_thread().name)
        self.begun.set()
        assert self.open.wait(30)
        if self.failure is not None:
            raise self.failure
        self.kernel.execute(calls, progress)


class Gates(KernelSource):
    """Puts a gate before every step, and another before everything that has to be made ready."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.prepared, self.preparing = threading.Event(), threading.Event()
        self.prepared.set()
        self.refusal: Exception | None = None
        self.finishing: Exception | None = None

    def prepare(self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device) -> None:
        self.preparing.set()
        assert self.prepared.wait(30)

    def choose(
        self, rule: AnyRule, forms: frozenset[KernelSignature], device: torch.device, wanted: KernelName | None
    ) -> Kernel:
        if self.refusal is not None:
            raise self.refusal
        self.gate.kernel = ReferenceKernel(rule)
        return self.gate

    def reference(self, rule: AnyRule) -> Kernel:
        self.gate.failure = self.finishing
        return ReferenceKernel(rule) if self.finishing is None else self.gate


class Place:
    """A host with its kernels, a clock that is set by hand, and ways to write to it."""

    def __init__(self, elements: int = SMALL, consistency: dict[str, object] = ASYNC, tensors: int = 1) -> None:
        plan = Plan.build(
            name="s",
            optimizer="Adagrad",
            groups=[{"lr": 0.1}],
            segments=[SegmentSpec(f"p{index}", (elements,), "float32") for index in range(tensors)],
            consistency=consistency,
            nonfinite="refuse",
            kernel="auto",
        )
        self.kernels, self.now = Gates(), 0.0
        self.executor = ThreadPoolExecutor(2, thread_name_prefix="step")
        session = Session(plan, incarnation="here", kernels=self.kernels, device="cpu")
        self.host: Actor = Actor(session, self.executor, lambda: self.now)
        self.tensors = tensors

    async def begin(self, *workers: str) -> None:
        """Let workers join, the first of them with parameters."""
        for worker in workers or ("w0",):
            await self.host.join(worker, 1)
        head = PutHead(WriteName((workers or ("w0",))[0], 1, 1), "here", ("param",), initial=True)
        intake = self.host.begin_put(head, self.host.plan.layout.nbytes)
        for view in intake.views:
            view[:] = bytes(len(view))
        await self.host.put(head, intake, "first")

    async def push(
        self, worker: str = "w0", sequence: int | None = None, value: float = 1.0, segments: list[int] | None = None
    ) -> Answer:
        """Push gradients that are the same everywhere."""
        number = sequence or (2 if worker == "w0" else 1)
        head = PushHead(WriteName(worker, 1, number), "here", 0, segments=segments)
        size = self.host.plan.layout.nbytes
        intake = self.host.begin_push(head, size if segments is None else size // self.tensors)
        for view in intake.views:
            view[:] = bytes(tensor_memory(torch.full((len(view) // 4,), value)))
        return await self.host.push(head, intake, f"{worker} {sequence} {value}")

    async def until(self, event: threading.Event) -> None:
        """Wait for something that happens in another thread."""
        assert await asyncio.get_running_loop().run_in_executor(None, event.wait, 30)

    async def waiting(self, worker: str) -> None:
        """Wait until a push of a worker waits at the barrier."""
        while not (await self.host.worker(worker)).waiting:
            await asyncio.sleep(0)


def sync(workers: int, deadline_s: float = 60.0) -> dict[str, object]:
    return {"mode": "sync", "workers": workers, "deadline_s": deadline_s}


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await body()

    asyncio.run(bounded())
