"""Coroutines that begin at once, and become tasks when they first wait.

A small push never waits, so its answer needs neither a task nor a turn of the event loop. Until it waits, such a
coroutine is in no task: code that needs one (`asyncio.timeout`, anyio) awaits `in_task` first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from types import coroutine
from typing import Any


def begin(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Run a coroutine until it first waits, and return the task that continues from there; None if it has ended.

    Within a task it is not begun at once, as it would use that task as its own.

    Raises:
        BaseException: raised by the coroutine before it waited.
    """
    if asyncio.current_task() is not None:
        return loop.create_task(work)
    try:
        waits_for = work.send(None)
    except StopIteration:
        return None
    return loop.create_task(_rest(work, waits_for))


async def in_task() -> None:
    """Continue in a task."""
    if asyncio.current_task() is None:
        await asyncio.sleep(0)


async def _rest(work: Coroutine[Any, Any, None], waits_for: object) -> None:
    await _resumed(work, waits_for)


@coroutine
def _resumed(work: Coroutine[Any, Any, None], waits_for: object) -> Generator[object, None, None]:
    """Pass on the awaitables of a coroutine, and their results, until it ends."""
    while True:
        try:
            try:
                yield waits_for
            except BaseException as exc:
                waits_for = None  # a future with that error would keep this frame alive, and vice versa
                waits_for = work.throw(exc)
            else:
                waits_for = work.send(None)
        except StopIteration:
            return
