"""The state machine of each consistency mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from farstep.protocol.consistency import Async, Bounded, Consistency, Sync
from farstep_service.coordinator.modes.bounded import BoundedMode
from farstep_service.coordinator.modes.mode import AsyncMode, Mode
from farstep_service.coordinator.modes.sync import SyncMode
from farstep_service.coordinator.roster import Roster

MODES: Final[dict[type[Consistency], type[Any]]] = {
    Async: AsyncMode,
    Sync: SyncMode,
    Bounded: BoundedMode,
}


def places_of(mode: Consistency) -> int | None:
    """Return how many workers a mode has room for, None for any number."""
    return mode.workers if isinstance(mode, Sync) and mode.workers != "live" else None


def mode_for(mode: Consistency, roster: Roster, state: Any = None) -> Mode:
    """Return the state machine of a consistency mode: one that begins, or goes on with a state."""
    made: Callable[[Any, Roster, Any], Mode] = MODES[type(mode)]
    return made(mode, roster, state)
