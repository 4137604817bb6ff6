"""The alarm of a session: the event loop's timer, set to what time alone is going to decide."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, final

Ring = Callable[[], Coroutine[Any, Any, None]]


@final
class Alarm:
    """Call a coroutine function once its time has come.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def set(self, deadline: float | None, ring: Ring) -> None:
        """Call `ring` at this time of the clock, and not at the one set before; None for not at all."""
        self.cancel()
        if deadline is not None:
            delay_s = max(0.0, deadline - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._begin, ring)

    def cancel(self) -> None:
        """Forget the time that was set."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self, ring: Ring) -> None:
        task = asyncio.get_running_loop().create_task(ring())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
