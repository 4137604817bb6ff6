"""A session in this process: its turns, its waiting pushes, its timer, and whoever goes away in between."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from farstep.errors import BarrierTimeout, NonFinite, SessionLost, StepInterrupted, Unavailable
from farstep.protocol.messages import PushHead, PutHead, WriteName
from farstep_service.coordinator.coordinator import INITIALISE_WITHIN_S
from tests.support.service.hosting import ASYNC, LARGE, SMALL, Place, run, sync


@pytest.mark.promise("A push that is repeated while the first one still waits shares its outcome.", area="exactly once")
@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_a_push_repeated_while_it_waits_shares_one_outcome(elements: int) -> None:
    """Three requests with one push, and the one that completes the step: one version, one receipt."""

    async def body() -> None:
        place = Place(elements, sync(2))
        await place.begin("w0", "w1")
        twins = [asyncio.create_task(place.push("w0")) for _ in range(3)]
        await place.waiting("w0")
        last = await place.push("w1")
        answers = [await twin for twin in twins]
        assert {answer.receipt for answer in answers} == {last.receipt}
        assert last.receipt.version == 1
        assert (await place.host.summary()).version == 1

    run(body)


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_a_deadline_reaches_those_who_wait(elements: int) -> None:
    """The timer tells everyone, each in an error of his own, and the next step starts anew."""

    async def body() -> None:
        place = Place(elements, sync(3, deadline_s=0.02))
        await place.begin("w0", "w1", "w2")
        tasks = [asyncio.create_task(place.push(worker)) for worker in ("w0", "w1")]
        await place.waiting("w1")
        place.now = 1.0
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, BarrierTimeout) for result in results)
        tasks = [asyncio.create_task(place.push(worker)) for worker in ("w0", "w1", "w2")]
        assert [answer.receipt.version for answer in await asyncio.gather(*tasks)] == [1, 1, 1]

    run(body)


def test_a_timer_that_is_early_waits_for_the_rest() -> None:
    """A deadline is the clock's, not the event loop's: a tick before it decides nothing and comes again."""

    async def body() -> None:
        place = Place(SMALL, sync(2, deadline_s=0.01))
        await place.begin("w0", "w1")
        task = asyncio.create_task(place.push("w0"))
        await place.waiting("w0")
        for _ in range(3):  # the loop's time passes several deadlines, the session's stands still
            await asyncio.wait([task], timeout=0.02)
            assert not task.done()
        place.now = 0.01
        with pytest.raises(BarrierTimeout):
            await task

    run(body)


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_a_session_that_is_removed_tells_those_who_wait(elements: int) -> None:
    """Who waits at the barrier gets SessionLost, and so does everything that comes later."""

    async def body() -> None:
        place = Place(elements, sync(2))
        await place.begin("w0", "w1")
        tasks = [asyncio.create_task(place.push("w0")) for _ in range(2)]
        await place.waiting("w0")
        await place.host.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, SessionLost) for result in results)
        assert results[0] is not results[1]
        for ask in (
            place.push("w1"),
            place.host.reads.parameters(),
            place.host.reads.contents(["sum"]),
            place.host.join("w9", 1),
        ):
            with pytest.raises(SessionLost):
                await ask

    run(body)


def test_a_session_is_removed_between_two_steps() -> None:
    """A step that runs is finished and answered; one that has its body but not its turn is told the session is lost."""

    async def body() -> None:
        place = Place(LARGE)
        await place.begin("w0", "w1")
        place.kernels.gate.open.clear()
        running = asyncio.create_task(place.push("w0"))
        await place.until(place.kernels.gate.begun)
        closing = asyncio.create_task(place.host.close())
        queued = asyncio.create_task(place.push("w1"))
        await asyncio.sleep(0)
        place.kernels.gate.open.set()
        assert (await running).receipt.version == 1
        await closing
        with pytest.raises(SessionLost):
            await queued

    run(body)


def test_a_request_that_is_cancelled_does_not_take_the_others_with_it() -> None:
    """If the push that completes a step goes away while the step runs, the step is finished and the others learn so."""

    async def body() -> None:
        place = Place(LARGE, sync(2))
        await place.begin("w0", "w1")
        first = asyncio.create_task(place.push("w0"))
        await place.waiting("w0")
        place.kernels.gate.open.clear()
        last = asyncio.create_task(place.push("w1"))
        await place.until(place.kernels.gate.begun)
        last.cancel()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(last), 0.05)
        assert not last.done()  # it keeps its turn until the step has ended
        place.kernels.gate.open.set()
        assert (await first).receipt.contributors == ("w0", "w1")
        with pytest.raises(asyncio.CancelledError):
            await last
        assert (await place.push("w1")).duplicate
        assert (await place.host.summary()).version == 1

    run(body)


def test_a_request_that_is_cancelled_while_it_waits_leaves_its_push() -> None:
    """A push whose client has gone still takes part in the step; the client's retry finds the receipt."""

    async def body() -> None:
        place = Place(SMALL, sync(2))
        await place.begin("w0", "w1")
        first = asyncio.create_task(place.push("w0"))
        await place.waiting("w0")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await place.push("w1")).receipt.version == 1
        again = await place.push("w0")
        assert again.duplicate
        assert again.receipt.version == 1

    run(body)


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_a_step_that_cannot_begin_leaves_nobody_waiting(elements: int) -> None:
    """If the machine fails before a sync step begins, all who wait are told, and the same pushes work afterwards."""

    async def body() -> None:
        place = Place(elements, sync(2))
        await place.begin("w0", "w1")
        place.kernels.refusal = MemoryError("no memory is left")
        tasks = [asyncio.create_task(place.push(worker)) for worker in ("w0", "w1")]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, Unavailable) for result in results), results
        place.kernels.refusal = None
        tasks = [asyncio.create_task(place.push(worker)) for worker in ("w0", "w1")]
        assert [answer.receipt.version for answer in await asyncio.gather(*tasks)] == [1, 1]

    run(body)


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_each_who_waits_raises_an_error_of_his_own(elements: int) -> None:
    """One failure told to several requests is not one exception raised in all of them."""

    async def body() -> None:
        place = Place(elements, sync(2))
        await place.begin("w0", "w1")
        place.kernels.gate.failure = RuntimeError("the device is on fire")
        tasks = [asyncio.create_task(place.push(worker)) for worker in ("w0", "w0", "w1")]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, StepInterrupted) for result in results), results
        assert len({id(result) for result in results}) == 3
        place.kernels.gate.failure = None
        assert (await place.push("w0")).duplicate

    run(body)


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_where_steps_run(elements: int) -> None:
    """A small session steps on the event loop itself, a large one in a thread, whatever the size of the message."""

    async def body() -> None:
        place = Place(elements // 4, tensors=4)
        await place.begin()
        await place.push()
        await place.push(sequence=3, segments=[1, 2])
        own = threading.current_thread().name
        assert all((name == own) == (elements == SMALL) for name in place.kernels.gate.threads)
        assert len(place.kernels.gate.threads) == 2

    run(body)


def test_a_session_whose_step_cannot_be_finished_can_be_seen_and_removed() -> None:
    """It is listed, with its version; whoever writes, reads or joins is told, and removing it works."""

    async def body() -> None:
        place = Place(SMALL)
        await place.begin()
        place.kernels.gate.failure = place.kernels.finishing = RuntimeError("the device is on fire")
        for ask in (place.push, place.push, place.host.reads.parameters, lambda: place.host.join("w1", 1)):
            with pytest.raises(StepInterrupted):
                await ask()
        assert (await place.host.summary()).version == 0
        await place.host.close()
        with pytest.raises(SessionLost):
            await place.push()

    run(body)


def test_the_event_loop_does_not_wait_for_kernels_to_be_built() -> None:
    """First contents of a session whose kernels have to be built first leave the loop free, small as they may be."""

    async def body() -> None:
        place = Place(SMALL)
        place.kernels.prepared.clear()
        beginning = asyncio.create_task(place.begin())
        await place.until(place.kernels.preparing)
        assert not beginning.done()
        place.kernels.prepared.set()
        await beginning

    run(body)


def test_others_are_answered_while_a_step_runs() -> None:
    """During a long step of one session another one steps, and bodies of the first are received."""

    async def body() -> None:
        long, other = Place(LARGE), Place(SMALL)
        await long.begin("w0", "w1")
        await other.begin()
        long.kernels.gate.open.clear()
        running = asyncio.create_task(long.push("w0"))
        await long.until(long.kernels.gate.begun)
        assert (await other.push()).receipt.version == 1
        head = PushHead(WriteName("w1", 1, 1), "here", 0)
        assert long.host.begin_push(head, long.host.plan.layout.nbytes).views
        assert not running.done()
        long.kernels.gate.open.set()
        await running

    run(body)


def test_who_is_asked_for_first_parameters() -> None:
    """The first to join, he again if he comes back, and another one when he has not sent them for a minute."""

    async def body() -> None:
        place = Place(SMALL)
        asked = [(await place.host.join(worker, 1)).initialise for worker in ("w0", "w1", "w0", "w2")]
        assert asked == [True, False, True, False]
        place.now = INITIALISE_WITHIN_S
        asked = [(await place.host.join(worker, 1)).initialise for worker in ("w1", "w0", "w1")]
        assert asked == [True, False, True]
        place.now = 10 * INITIALISE_WITHIN_S
        head = PutHead(WriteName("w1", 3, 1), "here", ("param",), initial=True)
        intake = place.host.begin_put(head, place.host.plan.layout.nbytes)
        await place.host.put(head, intake, "first")
        joined = await place.host.join("w2", 1)
        assert (joined.initialised, joined.initialise) == (True, False)

    run(body)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Keep the garbage collector from hiding what holds on to memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("elements", [SMALL, LARGE])
@pytest.mark.parametrize("how", ["taken", "refused", "timed out"])
def test_gradients_are_given_back_at_once(elements: int, how: str) -> None:
    """When a push is answered, with a receipt or an error, its memory goes without the garbage collector's help."""

    async def body() -> None:
        place = Place(elements, sync(2, deadline_s=0.01) if how == "timed out" else ASYNC)
        await place.begin("w0", "w1")

        async def ask() -> weakref.ref[Any]:
            head = PushHead(WriteName("w0", 1, 2), "here", 0)
            intake = place.host.begin_push(head, place.host.plan.layout.nbytes)
            gone = weakref.ref(intake.contribution.buffers)  # type: ignore[attr-defined]  # the local host's own
            intake.views[0][:] = (b"\xff" if how == "refused" else b"\x00") * len(intake.views[0])
            with suppress(NonFinite, BarrierTimeout):
                assert (await place.host.push(head, intake, "x")).receipt.applied
                assert how == "taken"
            return gone

        asking = asyncio.create_task(ask())
        if how == "timed out":
            await place.waiting("w0")
            place.now = 1.0
        gone = await asking
        del asking
        if how != "timed out":
            await place.push("w1")  # the thread that worked last has let go of it, too
        assert gone() is None

    run(body)


def test_a_page_that_finishes_a_step_answers_those_who_waited_for_it() -> None:
    """Looking at a session finishes a step that failed midway; the push that then steps is answered, not forgotten."""

    async def body() -> None:
        place = Place(SMALL, {"mode": "bounded", "staleness": 0, "deadline_s": 600.0})
        await place.begin("w0", "w1")
        await place.push("w0", 2)
        waits = asyncio.create_task(place.push("w0", 3))
        await place.waiting("w0")
        place.kernels.gate.failure = place.kernels.finishing = RuntimeError("no luck")
        with pytest.raises(StepInterrupted):
            await place.push("w1")
        place.kernels.gate.failure = place.kernels.finishing = None
        await place.host.summary(10)
        assert (await asyncio.wait_for(waits, 10)).receipt.version == 3

    run(body)


@pytest.mark.parametrize(
    "mode", [ASYNC, {"mode": "bounded", "staleness": 1}, sync(1)], ids=lambda mode: str(mode["mode"])
)
@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_a_lease_begins_anew_with_the_answer(
    elements: int, mode: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that only pushes has its whole lease after each answer, however long its step took."""

    async def body() -> None:
        place = Place(elements, {**mode, "lease_s": 10.0})
        await place.begin("w0")
        answered = place.kernels.gate.execute

        def slow(*arguments: Any) -> None:
            answered(*arguments)
            place.now += 12.0

        monkeypatch.setattr(place.kernels.gate, "execute", slow)
        await place.push("w0", 2)
        view = await place.host.reads.parameters(write=WriteName("w0", 1, 2))
        view.release()
        assert (await place.host.worker("w0")).lease_s == 10.0

    run(body)
