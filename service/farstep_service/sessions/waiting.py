"""The writes of one session that have no answer yet: whoever sends one again waits for the same outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import chain
from typing import final

from farstep.errors import FarstepError
from farstep.messages import WriteName
from farstep_service.session import Outcome, Outcomes


@final
class Waiting:
    """Tell those who wait what became of their writes."""

    def __init__(self) -> None:
        self._futures: dict[WriteName, list[asyncio.Future[Outcome]]] = {}

    def of(self, name: WriteName) -> asyncio.Future[Outcome]:
        """Return where the outcome of a write is going to be, for one who waits: who gives up, does so alone."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._futures.setdefault(name, []).append(future)
        return future

    def resolve(self, outcomes: Outcomes) -> None:
        """Tell those whose writes have been decided about."""
        for name, outcome in outcomes.items():
            for future in self._futures.pop(name, ()):
                if not future.done():
                    future.set_result(outcome)

    def end(self, error: Callable[[], FarstepError]) -> None:
        """Tell everybody that nothing will be decided any more; each of them gets an error of its own."""
        for future in chain.from_iterable(self._futures.values()):
            if not future.done():
                future.set_result(Outcome(error()))
        self._futures.clear()
