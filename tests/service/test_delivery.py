"""Answers in shared memory: written by the step itself, and completed where they are of another version."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from farstep.protocol.memory import tensor_memory
from farstep.protocol.messages import PushHead, PutHead, SharedPush, WriteName
from farstep.protocol.shared_memory import OwnedSharedMemory, make
from farstep_service.kernels import Kernels
from farstep_service.layout import SegmentSpec
from farstep_service.plan import Plan
from farstep_service.session import Session
from farstep_service.sessions.actor import Actor
from farstep_service.sessions.shared_memory import SharedMemoryHandle

LENGTHS = (5, 7, 4)


@pytest.fixture
def made() -> Iterator[OwnedSharedMemory]:
    """Return memory of a worker."""
    own = make({"float32": sum(LENGTHS)})
    own.memory.gradients["float32"].fill_(3.0)
    own.memory.parameters["float32"].fill_(-1.0)
    yield own
    own.close()


async def begun(made: OwnedSharedMemory) -> Actor:
    """Return a session of two workers, of which the first shares memory with it."""
    plan = Plan.build(
        name="s",
        optimizer="Adam",
        groups=[{"lr": 0.1}],
        segments=[SegmentSpec(f"p{index}", (length,), "float32") for index, length in enumerate(LENGTHS)],
        consistency={"mode": "async"},
        nonfinite="refuse",
        kernel="reference",
    )
    session = Session(plan, incarnation="here", kernels=Kernels("reference"), device="cpu")
    host = Actor(session, ThreadPoolExecutor(1))
    for worker in ("w0", "w1"):
        await host.join(worker, 1)
    head = PutHead(WriteName("w0", 1, 1), "here", ("param",), initial=True)
    intake = host.begin_put(head, plan.layout.nbytes)
    for view in intake.views:
        view[:] = bytes(len(view))
    await host.put(head, intake, "first")
    await host.share("w0", SharedMemoryHandle(1, made.key, os.getpid(), made.fd))
    return host


async def pull(host: Actor) -> torch.Tensor:
    """Return a copy of the session's parameters."""
    view = await host.reads.parameters()
    try:
        return torch.frombuffer(bytearray(b"".join(view.views)), dtype=torch.float32)
    finally:
        view.release()


@pytest.mark.parametrize("segments", [None, [1, 2]], ids=["all", "some"])
@pytest.mark.parametrize("overtaken", [False, True])
def test_what_is_delivered_is_the_version_of_the_answer(
    made: OwnedSharedMemory, segments: list[int] | None, overtaken: bool
) -> None:
    """Whether the step wrote all of it, some segments had no gradient, or another worker's step came in between."""

    async def body() -> None:
        host = await begun(made)
        head = PushHead(WriteName("w0", 1, 2), "here", 0, segments=segments, shared=SharedPush(made.key, 1))
        intake = host.begin_push(head, 0)
        await host.push(head, intake, "a")
        first = await pull(host)
        written = made.memory.parameters["float32"]
        stepped = slice(None) if segments is None else slice(5, 12)
        assert torch.equal(written[stepped], first[stepped])
        assert segments is None or bool((written[:5] == -1).all())
        if overtaken:
            other = PushHead(WriteName("w1", 1, 1), "here", 0)
            sent = host.begin_push(other, 4 * sum(LENGTHS))
            sent.views[0][:] = tensor_memory(torch.full((sum(LENGTHS),), -9.0))
            await host.push(other, sent, "b")
            assert torch.equal(written[stepped], first[stepped])
        view = await host.reads.parameters(None, head.name, spent=intake)
        assert await host.deliver(head, view, intake)
        view.release()
        assert torch.equal(written, await pull(host))

    asyncio.run(asyncio.wait_for(body(), 30))


@pytest.mark.parametrize("fill", [SharedPush("", 1, deliver=False), None], ids=["gradients only", "bodies"])
def test_nothing_is_written_where_it_is_not_wanted(made: OwnedSharedMemory, fill: SharedPush | None) -> None:
    """The memory is the worker's own then."""

    async def body() -> None:
        host = await begun(made)
        own = None if fill is None else SharedPush(made.key, fill.count, fill.deliver)
        head = PushHead(WriteName("w0", 1, 2), "here", 0, shared=own)
        intake = host.begin_push(head, 0 if own else 4 * sum(LENGTHS))
        for view in intake.views:
            view[:] = tensor_memory(made.memory.gradients["float32"])
        await host.push(head, intake, "a")
        assert bool((made.memory.parameters["float32"] == -1).all())

    asyncio.run(asyncio.wait_for(body(), 30))
