"""Coroutines that begin at once and become tasks when they wait."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from contextlib import suppress
from weakref import ref

import pytest

from farstep_service.sessions.coroutines import begin, in_task


def run(talk: Callable[[asyncio.AbstractEventLoop], Coroutine[None, None, None] | None]) -> None:
    """Call a function from the event loop, outside any task, and await what it returns."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        called = loop.create_future()
        loop.call_soon(lambda: called.set_result(talk(loop)))
        if (rest := await called) is not None:
            await rest

    asyncio.run(main())


def test_what_need_not_wait_is_done_at_once():
    """No task is made for it."""
    done: list[int] = []

    async def work() -> None:
        done.append(1)

    def talk(loop: asyncio.AbstractEventLoop) -> None:
        assert begin(loop, work()) is None
        assert done == [1]

    run(talk)


def test_what_waits_goes_on_in_a_task():
    """It gets the results and the errors of what it waits for, as often as it waits."""
    heard: list[str] = []

    async def work(good: asyncio.Future[str], bad: asyncio.Future[str]) -> None:
        heard.append(await good)
        try:
            await bad
        except ValueError as error:
            heard.append(str(error))
        await asyncio.sleep(0)
        heard.append("end")

    def talk(loop: asyncio.AbstractEventLoop) -> Coroutine[None, None, None]:
        good, bad = loop.create_future(), loop.create_future()
        task = begin(loop, work(good, bad))
        assert task is not None
        assert heard == []

        async def rest() -> None:
            good.set_result("good")
            await asyncio.sleep(0)
            bad.set_exception(ValueError("bad"))
            await task
            assert heard == ["good", "bad", "end"]

        return rest()

    run(talk)


async def fails(waited: bool) -> None:
    """Raise, at once or later."""
    if waited:
        await asyncio.sleep(0)
    raise ValueError("wrong")


def test_errors_reach_whoever_began_it():
    """At once, or through the task."""

    def talk(loop: asyncio.AbstractEventLoop) -> Coroutine[None, None, None]:
        with pytest.raises(ValueError, match="wrong"):
            begin(loop, fails(False))
        task = begin(loop, fails(True))
        assert task is not None

        async def rest() -> None:
            with pytest.raises(ValueError, match="wrong"):
                await task

        return rest()

    run(talk)


class Memory:
    """What a coroutine works with."""


def test_what_an_awaited_error_ends_goes_without_the_collector():
    """The error and what was waited for do not keep the coroutine, whoever handles it there."""

    async def work(futures: list[asyncio.Future[None]], memory: Memory) -> None:
        with suppress(ValueError):
            await futures.pop()

    def talk(loop: asyncio.AbstractEventLoop) -> Coroutine[None, None, None]:
        future: asyncio.Future[None] = loop.create_future()
        memory = Memory()
        tasks, gone, fail = [begin(loop, work([future], memory))], ref(memory), [future.set_exception]

        async def rest() -> None:
            fail.pop()(ValueError("bad"))
            task = tasks.pop()
            assert task is not None
            await task
            del task
            assert gone() is None

        return rest()

    gc.collect()
    gc.disable()
    try:
        run(talk)
    finally:
        gc.enable()


def test_cancelling_the_task_reaches_the_coroutine():
    """It can still clean up, and answer."""
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended.append("cleaned up")
            raise

    def talk(loop: asyncio.AbstractEventLoop) -> Coroutine[None, None, None]:
        task = begin(loop, work())
        assert task is not None

        async def rest() -> None:
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended == ["cleaned up"]

        return rest()

    run(talk)


async def limited(outcome: list[str]) -> None:
    """Wait for longer than a time limit allows."""
    await in_task()
    try:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()
    except TimeoutError:
        outcome.append("late")


@pytest.mark.parametrize("within", [False, True], ids=["begun outside tasks", "begun within a task"])
def test_a_time_limit_is_that_of_its_own_task(within: bool):
    """Time limits belong to tasks: one that is asked for early must not end another's."""
    outcome: list[str] = []

    def talk(loop: asyncio.AbstractEventLoop) -> Coroutine[None, None, None]:
        early = None if within else begin(loop, limited(outcome))

        async def rest() -> None:
            task = begin(loop, limited(outcome)) if within else early
            assert task is not None
            await task
            assert outcome == ["late"]

        return rest()

    run(talk)
