"""Work on a session, where it belongs: on the event loop if it is small, else in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import TypeVar

from farstep.errors import FarstepError

Result = TypeVar("Result")


async def run(
    executor: Executor, work: Callable[[], Result], abandoned: Callable[[Result], None], *, inline: bool
) -> Result:
    """Do work; this returns or raises only when it has ended, even if whoever asked has gone.

    Args:
        executor: runs large work.
        work: what to do.
        abandoned: takes the result in the place of one who has gone, since others may wait for it.
        inline: do it here and now.
    """
    if inline:
        return work()
    running = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        with suppress(FarstepError):
            abandoned(await running)
        raise
    finally:
        del running  # an error in it and this frame would keep each other, and the gradients with them
