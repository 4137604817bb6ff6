"""Work on a session, where it belongs: on the event loop if it is small, else in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import Final, TypeVar, final

from farstep.errors import FarstepError
from farstep_service.plan import Plan

INLINE_BYTES: Final = 1280 * 1024
"""Work on a session of fewer bytes than this is done on the event loop itself: it takes up to a millisecond with the
reference kernel and a quarter of one with a fused one, of which the hop to a thread and back would take half again."""
SEGMENT_COST_BYTES: Final = 512
"""What a segment's bookkeeping adds to a step, as the bytes that take as long."""

Result = TypeVar("Result")


@final
class Size:
    """The size of a session, which is counted once for each of its plans."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._fits = False

    def is_small(self, plan: Plan) -> bool:
        """Say whether work on a session with this plan is done on the event loop."""
        if self._plan is not plan:
            step_bytes = plan.rule.step_bytes(plan.layout, plan.groups)
            self._fits = step_bytes + SEGMENT_COST_BYTES * len(plan.layout.segments) <= INLINE_BYTES
            self._plan = plan
        return self._fits


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
