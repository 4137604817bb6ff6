"""The state machine of each consistency mode, by its options; and the simplest of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, final

from farstep.protocol.consistency import Async, Bounded, Consistency, Sync
from farstep_service.coordinator.modes.bounded import BoundedMode
from farstep_service.coordinator.modes.decisions import Decision, Pushed, Skip, Step
from farstep_service.coordinator.modes.mode import Mode
from farstep_service.coordinator.modes.sync import SyncMode
from farstep_service.coordinator.roster import Roster


@dataclass(slots=True)
class AsyncState:
    """The pushes that are about to be steps, by worker, in the order in which they came."""

    ready: dict[str, Pushed] = field(default_factory=dict)


@final
class AsyncMode(Mode):
    """Async: each push is a step."""

    record = AsyncState

    def __init__(self, mode: Async, roster: Roster, state: AsyncState | None = None) -> None:
        super().__init__(roster)
        self.state: AsyncState = state or AsyncState()

    def offer(self, push: Pushed, now: float) -> None:
        self.state.ready[push.worker] = push

    def withdraw(self, worker: str) -> None:
        self.state.ready.pop(worker, None)

    def decide(self, version: int, now: float) -> Decision | None:
        ready = self.state.ready
        if not ready:
            return None
        push = ready.pop(next(iter(ready)))
        return Skip((push.worker,)) if push.skip else Step((push.worker,))

    @property
    def deadline(self) -> float | None:
        return None


MODES: Final[dict[type[Consistency], type[Any]]] = {
    Async: AsyncMode,
    Sync: SyncMode,
    Bounded: BoundedMode,
}


def mode_for(mode: Consistency, roster: Roster, state: Any = None) -> Mode:
    """Return the state machine of a consistency mode: one that begins, or goes on with a state."""
    made: Callable[[Any, Roster, Any], Mode] = MODES[type(mode)]
    return made(mode, roster, state)
