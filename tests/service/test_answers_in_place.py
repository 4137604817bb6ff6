"""Answers that a step has written where they are wanted, over gradients in 16 bits: they are those of a copy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from farstep.protocol.memory import tensor_memory
from farstep.protocol.messages import PushHead, PutHead, WriteName
from farstep_service.kernels import Kernels
from farstep_service.layout import SegmentSpec
from farstep_service.plan import Plan
from farstep_service.session import Session
from farstep_service.sessions import Intake
from farstep_service.sessions.actor import Actor
from farstep_service.sessions.views import PushIntake

LENGTHS = {"a": 5, "wide": 3, "b": 7, "c": 4}
DTYPES = {"wide": "float64"}
HALF = torch.bfloat16


class Place:
    """A host with workers that send and take bfloat16, and the bytes of their answers."""

    def __init__(self, consistency: dict[str, object]) -> None:
        plan = Plan.build(
            name="s",
            optimizer="Adam",
            groups=[{"lr": 0.1}],
            segments=[SegmentSpec(name, (size,), DTYPES.get(name, "float32")) for name, size in LENGTHS.items()],
            consistency=consistency,
            nonfinite="refuse",
            kernel="reference",
        )
        session = Session(plan, incarnation="here", kernels=Kernels("reference"), device="cpu")
        self.host = Actor(session, ThreadPoolExecutor(1))
        self._sequence: dict[str, int] = {}

    async def begin(self, *workers: str) -> None:
        """Let workers join, the first of them with parameters."""
        for worker in workers:
            await self.host.join(worker, 1)
            self._sequence[worker] = 1
        head = PutHead(WriteName(workers[0], 1, 1), "here", ("param",), initial=True)
        self._sequence[workers[0]] = 2
        intake = self.host.begin_put(head, self.host.plan.layout.nbytes)
        for view in intake.views:
            view[:] = bytes(len(view))
        await self.host.put(head, intake, "first")

    async def push(self, worker: str, value: float, segments: list[int] | None = None, **more: Any) -> Intake:
        """Push gradients that are the same everywhere."""
        name = WriteName(worker, 1, self._sequence[worker])
        self._sequence[worker] += 1
        head = PushHead(name, "here", 0, segments=segments, wire_gradients="bfloat16", **more)
        names = [name for index, name in enumerate(LENGTHS) if segments is None or segments[0] <= index < segments[1]]
        sent = [torch.full((LENGTHS[name],), value, dtype=torch.float64 if name in DTYPES else HALF) for name in names]
        intake = self.host.begin_push(head, sum(each.nbytes for each in sent))
        payload = b"".join(bytes(tensor_memory(each)) for each in sent)
        for view in intake.views:
            view[:] = payload[: len(view)]
            payload = payload[len(view) :]
        await self.host.push(head, intake, f"{name} {value}")
        return intake

    async def answer(self, spent: Intake | None) -> list[bytes]:
        """Return the payload of an answer in bfloat16."""
        view = await self.host.reads.parameters(codec="bfloat16", spent=spent)
        try:
            return [bytes(each) for each in view.views]
        finally:
            view.release()


def copied(intake: Intake) -> frozenset[int]:
    """Return the segments that the step of a push wrote where its gradients were."""
    assert isinstance(intake, PushIntake)
    own = intake.contribution.copied
    return frozenset() if own is None else own.segments


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


@pytest.mark.parametrize("segments", [None, [1, 3]], ids=["all", "some"])
def test_what_a_step_has_written_is_the_answer(segments: list[int] | None) -> None:
    """All of it or, where gradients were missing, completed by copies of the other segments."""

    async def body() -> None:
        place = Place({"mode": "async"})
        await place.begin("w0")
        await place.push("w0", 3.0, wire_parameters="bfloat16")
        intake = await place.push("w0", -1.0, segments, wire_parameters="bfloat16")
        assert copied(intake) == frozenset(range(4) if segments is None else range(1, 3))
        expected = await place.answer(None)
        assert await place.answer(intake) == expected

    run(body)


def test_a_later_step_of_another_worker_is_in_the_answer() -> None:
    """What the earlier step has written is of an older version then, and is written over."""

    async def body() -> None:
        place = Place({"mode": "async"})
        await place.begin("w0", "w1")
        first = await place.push("w0", 3.0, wire_parameters="bfloat16")
        earlier = await place.answer(None)
        second = await place.push("w1", -5.0, wire_parameters="bfloat16")
        later = await place.answer(None)
        assert earlier != later
        assert [await place.answer(first), await place.answer(second)] == [later, later]

    run(body)


@pytest.mark.parametrize(
    "more", [{}, {"wire_parameters": "float16"}, {"wire_parameters": "bfloat16", "wanted": "none"}]
)
def test_gradients_stay_where_no_such_answer_is_wanted(more: dict[str, Any]) -> None:
    """In full, in another dtype, or none at all."""

    async def body() -> None:
        place = Place({"mode": "async"})
        await place.begin("w0")
        intake = await place.push("w0", 3.0, **more)
        assert copied(intake) == frozenset()
        assert isinstance(intake, PushIntake)
        memory = intake.contribution.buffers
        assert memory is not None
        assert torch.equal(memory.segment(0), torch.full((5,), 3.0, dtype=HALF))

    run(body)


def test_several_workers_of_a_step_get_the_same() -> None:
    """A sum is in memory of its own: nobody's gradients are written over by the step, and each answer is a copy."""

    async def body() -> None:
        place = Place({"mode": "sync", "workers": 2})
        await place.begin("w0", "w1")
        intakes = await asyncio.gather(
            place.push("w0", 1.5, wire_parameters="bfloat16"), place.push("w1", 2.5, wire_parameters="bfloat16")
        )
        assert list(map(copied, intakes)) == [frozenset(), frozenset()]
        expected = await place.answer(None)
        assert [await place.answer(intake) for intake in intakes] == [expected, expected]

    run(body)


def test_a_sum_of_gradients_in_16_bits_is_the_sum_of_widened_ones() -> None:
    """Of two workers, divided by their number: the bits of the same step in full."""
    values = torch.tensor([1.0, 0.5, 0.25, 1e-3, 3e4]).to(HALF)

    async def stepped(half: str | None) -> Tensor:
        plan = Plan.build(
            name="s",
            optimizer="SGD",
            groups=[{"lr": 1.0}],
            segments=[SegmentSpec("w", (5,), "float32")],
            consistency={"mode": "sync", "workers": 2},
            nonfinite="refuse",
            kernel="reference",
        )
        session = Session(plan, incarnation="here", kernels=Kernels("reference"), device="cpu")
        host = Actor(session, ThreadPoolExecutor(1))
        for worker in ("w0", "w1"):
            await host.join(worker, 1)
        head = PutHead(WriteName("w0", 1, 1), "here", ("param",), initial=True)
        put = host.begin_put(head, 20)
        put.views[0][:] = bytes(20)
        await host.put(head, put, "first")

        async def push(worker: str, sequence: int, factor: float) -> None:
            sent = (values * factor).to(HALF if half else torch.float32)
            name = WriteName(worker, 1, sequence)
            head = PushHead(name, "here", 0, wire_gradients=half)
            intake = host.begin_push(head, sent.nbytes)
            intake.views[0][:] = tensor_memory(sent)
            await host.push(head, intake, worker)

        await asyncio.gather(push("w0", 2, 1.0), push("w1", 1, 0.375))
        view = await host.reads.parameters()
        try:
            return torch.frombuffer(bytearray(view.views[0]), dtype=torch.float32)
        finally:
            view.release()

    async def body() -> None:
        assert torch.equal(await stepped("bfloat16"), await stepped(None))

    run(body)
