"""Coroutines that begin at once, and become tasks when they first wait.

A small push never waits, so its answer needs neither a task nor a turn of the event loop. Until it waits, a coroutine
that was begun like this is in no task: whoever needs one (`asyncio.timeout`, anyio) asks for it with `in_task`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from types import coroutine
from typing import Any


def begin(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Run a coroutine up to where it waits, and return the task that goes on from there; None if it has ended.

    Within a task it is not begun at once: what it asks of its task, it would ask of that one.

    Raises:
        BaseException: whatever it raised before it waited.
    """
    if asyncio.current_task() is not None:
        return loop.create_task(work)
    try:
        waits_for = work.send(None)
    except StopIteration:
        return None
    return loop.create_task(_rest(work, waits_for))


async def in_task() -> None:
    """Go on in a task."""
    if asyncio.current_task() is None:
        await asyncio.sleep(0)


async def _rest(work: Coroutine[Any, Any, None], waits_for: object) -> None:
    await _resumed(work, waits_for)


@coroutine
def _resumed(work: Coroutine[Any, Any, None], waits_for: object) -> Generator[object, None, None]:
    """Hand on what a coroutine waits for, and what becomes of that, until it ends."""
    while True:
        try:
            try:
                yield waits_for
            except BaseException as exc:
                waits_for = None  # a future with that error, which would keep this frame, and be kept by it
                waits_for = work.throw(exc)
            else:
                waits_for = work.send(None)
        except StopIteration:
            return
