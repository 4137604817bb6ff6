"""The versions of one session that are being read, and what they cost: memory that the next step may have to wait for.

A view of a version keeps it until the view is released. A copy in 16 bits does not: it gives the version back when it
has been made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Final, final

from farstep.wire import to_ranges
from farstep_service.hosts.eager import in_task
from farstep_service.hosts.host import Intake, View
from farstep_service.hosts.narrowed import NarrowedView, Narrowings
from farstep_service.hosts.views import HeldView, PushIntake
from farstep_service.layout import Layout
from farstep_service.store import Held

NARROW_INLINE_BYTES: Final = 4 * 1024 * 1024
"""Parameters of fewer bytes than this are narrowed on the event loop; it takes a fraction of a millisecond."""
READERS_WITHIN_S: Final = 1.0
"""How long a step waits for readers of two versions, so that it does not need memory for a third."""


@final
class Reading:
    """Make views of versions, and wait for those who read them.

    Args:
        executor: runs large copies.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._narrowings = Narrowings(executor)
        self._released = asyncio.Event()

    @property
    def nbytes(self) -> int:
        """Return the memory of copies that others may share."""
        return self._narrowings.nbytes

    def held(self, held: Held, chosen: Sequence[int]) -> View:
        """Return the view of some segments of a version; a large one that is not on the CPU takes a while."""
        count = len(held.buffers.layout.segments)
        indices, ranges = (None, None) if len(chosen) == count else (chosen, to_ranges(chosen))
        return HeldView(held, indices, ranges, self._released.set)

    async def held_elsewhere(self, held: Held, chosen: Sequence[int]) -> View:
        """Return the same, made in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self.held, held, chosen)

    async def narrowed(
        self, held: Held, half: str, chosen: Sequence[int], layout: Layout, spent: Intake | None
    ) -> View:
        """Return the view of some segments in 16 bits.

        Args:
            held, half, chosen: the version, the dtype, and the segments.
            layout: what the reader knows of the version.
            spent: see `Host.parameters`.
        """
        count = len(held.buffers.layout.segments)
        ranges = None if len(chosen) == count else to_ranges(chosen)
        gradients = spent.contribution if isinstance(spent, PushIntake) else None
        inline = layout.nbytes <= NARROW_INLINE_BYTES
        narrowed = await self._narrowings.of(held, half, chosen, gradients, inline=inline)
        self._released.set()
        return NarrowedView(narrowed, chosen, ranges, self._released.set)

    async def finish(self, crowded: Callable[[], bool]) -> None:
        """Let readers of two versions finish before a step makes a third; very slow ones cost memory instead.

        Args:
            crowded: says whether there are such readers.
        """
        await in_task()
        with suppress(TimeoutError):
            async with asyncio.timeout(READERS_WITHIN_S):
                while crowded():
                    self._released.clear()
                    await self._released.wait()


def chosen_of(held: Held, layout: Layout, since: int | None) -> Sequence[int]:
    """Return those segments of a version that a reader knows, and that changed after a version if one is given."""
    known = len(layout.segments)
    if since is None:
        return range(known)
    changed = held.changed_since(since)
    if known < len(held.buffers.layout.segments):
        return [index for index in changed if index < known]
    return changed
