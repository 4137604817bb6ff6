"""Gradients in shared memory whose worker goes on writing to them: what was looked at is what a step takes."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farstep.errors import NonFinite
from farstep.optim import SGD
from farstep.protocol.messages import PushHead, PutHead, SharedPush, WriteName
from farstep.protocol.shared_memory import OwnedSharedMemory, make
from farstep_service.kernels.kernel import Call, Kernel, KernelSource, Progress
from farstep_service.kernels.reference import ReferenceKernel
from farstep_service.layout import SegmentSpec
from farstep_service.optimizers.rule import AnyRule, KernelName, KernelSignature
from farstep_service.plan import Plan
from farstep_service.session import Session
from farstep_service.sessions import Actor, Answer, SharedMemoryHandle
from tests.support.service.servers import running_server

LENGTHS = (500, 7)
ASYNC: dict[str, object] = {"mode": "async"}
SYNC: dict[str, object] = {"mode": "sync", "workers": 2}


class Writing(Kernel):
    """A reference kernel before which somebody else has a turn."""

    name = "reference"

    def __init__(self, rule: AnyRule, before: Callable[[], None]) -> None:
        self._kernel = ReferenceKernel(rule)
        self._before = before

    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        self._before()
        self._kernel.execute(calls, progress)


@dataclass
class Kernels(KernelSource):
    """Gives every step such a kernel."""

    before: Callable[[], None]

    def prepare(self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device) -> None:
        """Nothing has to be made ready."""

    def choose(
        self, rule: AnyRule, forms: frozenset[KernelSignature], device: torch.device, wanted: KernelName | None
    ) -> Kernel:
        return Writing(rule, self.before)

    def reference(self, rule: AnyRule) -> Kernel:
        return ReferenceKernel(rule)


class Place:
    """A host, two workers that share memory with it, and a hook between the look at gradients and their use."""

    def __init__(self, consistency: dict[str, object], *, nonfinite: str = "refuse", **policy: object) -> None:
        plan = Plan.build(
            name="s",
            optimizer="SGD",
            groups=[{"lr": 1.0}],
            segments=[SegmentSpec(f"p{index}", (length,), "float32") for index, length in enumerate(LENGTHS)],
            consistency=consistency,
            nonfinite=nonfinite,
            kernel="reference",
            policy=policy,
        )
        self.before: Callable[[], None] = lambda: None
        session = Session(plan, incarnation="here", kernels=Kernels(lambda: self.before()), device="cpu")
        self.host = Actor(session, ThreadPoolExecutor(1))
        self.made: dict[str, OwnedSharedMemory] = {}
        self._sequences: dict[str, int] = {}

    async def begin(self) -> None:
        """Join both workers, with parameters that are zero."""
        for worker in ("w0", "w1"):
            await self.host.join(worker, 1)
        head = PutHead(self._next("w0"), "here", ("param",), initial=True)
        intake = self.host.begin_put(head, 4 * sum(LENGTHS))
        for view in intake.views:
            view[:] = bytes(len(view))
        await self.host.put(head, intake, "first")
        for worker in ("w0", "w1"):
            self.made[worker] = own = make({"float32": sum(LENGTHS)})
            await self.host.share(worker, SharedMemoryHandle(1, own.key, os.getpid(), own.fd))

    def gradients(self, worker: str) -> Tensor:
        """Return a worker's own, where it shares them."""
        return self.made[worker].memory.gradients["float32"]

    def spoil(self, worker: str, value: float) -> None:
        """Overwrite all that a worker shares, the memory for answers too."""
        self.gradients(worker).fill_(value)
        self.made[worker].memory.parameters["float32"].fill_(value)

    async def push(self, worker: str) -> Answer:
        """Push what a worker shares."""
        name = self._next(worker)
        fill = SharedPush(self.made[worker].key, name.sequence, deliver=True)
        head = PushHead(name, "here", 0, shared=fill)
        return await self.host.push(head, self.host.begin_push(head, 64), str(name))

    async def parameters(self) -> Tensor:
        """Return a copy of the session's parameters."""
        view = await self.host.reads.parameters()
        try:
            return torch.frombuffer(bytearray(b"".join(view.views)), dtype=torch.float32)
        finally:
            view.release()

    def _next(self, worker: str) -> WriteName:
        self._sequences[worker] = self._sequences.get(worker, 0) + 1
        return WriteName(worker, 1, self._sequences[worker])


def played(place: Place, scene: Callable[[], object]) -> None:
    async def play() -> None:
        await place.begin()
        try:
            await scene()  # type: ignore[misc]
        finally:
            await place.host.close()
            for made in place.made.values():
                made.close()

    asyncio.run(play())


@pytest.mark.promise(
    "Gradients in shared memory are the ones that were checked, whatever a worker writes meanwhile.",
    area="security",
)
@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 5.0])
def test_a_step_takes_the_gradients_that_were_looked_at(spoilt: float) -> None:
    """What their worker writes between the look and the kernel is in no parameter, in this push and in the next."""
    place = Place(ASYNC)

    async def scene() -> None:
        place.before = lambda: place.spoil("w0", spoilt)
        for step in (1, 2):
            place.gradients("w0").fill_(float(step))
            assert (await place.push("w0")).receipt.version == step
        assert torch.equal(await place.parameters(), torch.full((sum(LENGTHS),), -3.0))

    played(place, scene)


def test_gradients_that_wait_at_a_barrier_are_those_that_were_looked_at() -> None:
    """A worker that spoils its own while they wait changes nothing, and the other worker is told of no NaN."""
    place = Place(SYNC)

    async def scene() -> None:
        for worker, value in (("w0", 1.0), ("w1", 3.0)):
            place.gradients(worker).fill_(value)
        waiting = asyncio.create_task(place.push("w0"))
        await asyncio.sleep(0)
        place.spoil("w0", math.nan)
        place.before = lambda: place.spoil("w1", math.nan)
        answers = [await place.push("w1"), await waiting]
        assert [answer.receipt.version for answer in answers] == [1, 1]
        assert torch.equal(await place.parameters(), torch.full((sum(LENGTHS),), -2.0))
        assert place.gradients("w0").isnan().all()

    played(place, scene)


def test_rounds_that_are_accumulated_stay_as_they_came() -> None:
    """The sum of several pushes of one worker is of what each of them held, though all came in the same memory."""
    place = Place(ASYNC, accumulate=2)

    async def scene() -> None:
        for value in (1.0, 3.0):
            place.gradients("w0").fill_(value)
            await place.push("w0")
            place.spoil("w0", math.nan)
        assert torch.equal(await place.parameters(), torch.full((sum(LENGTHS),), -2.0))

    played(place, scene)


def test_gradients_that_wait_to_be_clipped_are_those_that_arrived() -> None:
    """A session that takes NaN, but clips, cannot be made to clip another gradient than the one that was pushed."""
    place = Place(SYNC, nonfinite="allow", clip_norm=1.0)

    async def scene() -> None:
        for worker in ("w0", "w1"):
            place.gradients(worker).fill_(4.0)
        waiting = asyncio.create_task(place.push("w0"))
        await asyncio.sleep(0)
        place.spoil("w0", -1e30)
        await asyncio.gather(place.push("w1"), waiting)
        found = await place.parameters()
        assert math.isclose(float(found.norm()), 1.0, rel_tol=1e-4)
        assert (found < 0).all()

    played(place, scene)


def test_a_refused_push_says_which_gradient_of_its_worker_was_wrong() -> None:
    """NaN that is there when the push is looked at is refused by name, and the next push is taken."""
    place = Place(ASYNC)

    async def scene() -> None:
        place.gradients("w0").fill_(1.0)[LENGTHS[0] + 1] = math.nan
        with pytest.raises(NonFinite, match="'p1' from worker 'w0'"):
            await place.push("w0")
        place._sequences["w0"] -= 1
        place.gradients("w0").fill_(1.0)
        assert (await place.push("w0")).receipt.version == 1

    played(place, scene)


@pytest.mark.parametrize(("nonfinite", "copies"), [("refuse", 3), ("skip", 3), ("allow", 2)])
def test_memory_for_the_copy_is_counted(nonfinite: str, copies: int) -> None:
    """A session that looks at gradients takes half as much again for each worker's shared memory, and says so."""
    place = Place(ASYNC, nonfinite=nonfinite)

    async def scene() -> None:
        nbytes = 4 * sum(LENGTHS)
        assert 2 * copies * nbytes <= place.host.shared_bytes <= 2 * copies * nbytes + 4 * 64

    played(place, scene)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a server that listens at a path."""
    with running_server("--unix", str(Path(tmp_path_factory.mktemp("m")) / "s"), loaded=True) as running:
        yield running.unix


@pytest.mark.promise(
    "A gradient with NaN or Inf is refused, naming tensor and worker, and nothing is applied.",
    area="NaN, clipping and averages",
)
def test_no_parameter_is_ever_nan_while_a_worker_keeps_writing(url: str) -> None:
    """Over a real socket, with a thread that writes NaN and 0 in turn: each push is refused, or its step is finite."""
    parameter = torch.nn.Parameter(torch.zeros(2_000_000))
    optimizer = SGD([parameter], lr=0.1, server=url, kernel="reference", session="hostile")
    copy = torch.nn.Parameter(torch.zeros(2_000_000))
    reader = SGD([copy], lr=0.1, server=url, kernel="reference", session="hostile")
    parameter.grad = torch.zeros(2_000_000)
    optimizer.step()
    shared = optimizer._membership.link._buffers.sharing.memory.gradients["float32"]  # type: ignore[attr-defined]
    over, outcomes = threading.Event(), {"refused": 0, "applied": 0}

    def write() -> None:
        while not over.is_set():
            shared[-1] = math.nan
            shared[-1] = 0.0

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            try:
                optimizer.step()
                outcomes["applied"] += 1
            except NonFinite:
                outcomes["refused"] += 1
            reader.pull()
            assert copy.isfinite().all()
    finally:
        over.set()
        writer.join()
        optimizer.close()
        reader.close()
    assert outcomes["applied"]
