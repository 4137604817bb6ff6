"""How the pushes of several workers become steps: the modes a session can be in.

`Async`: every push is a step of its own, applied in the order of arrival.
`Sync`: a step waits for one push of each of N workers, reduces them in the order of the worker names (so that a run
gives the same bits whatever the order of arrival), divides by N and is applied once. If the deadline passes first,
nobody's gradients are applied and every waiting worker learns so. If one of the workers skips the step, because its
scaled gradients overflowed, all of them do, as soon as all are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from farstep.errors import InvalidOption

LONGEST_DEADLINE_S = 7 * 86_400


@dataclass(frozen=True, slots=True)
class Async:
    """Apply every push by itself, as it arrives."""

    mode: ClassVar[str] = "async"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """Apply one step for one push of each of `workers` workers.

    Attributes:
        workers: how many workers make a step.
        deadline_s: seconds from the first push of a step until the step is given up for all who wait.

    Raises:
        InvalidOption: on a worker count below 1 or a deadline that is not positive or beyond a week.
    """

    workers: int
    deadline_s: float = 60.0

    mode: ClassVar[str] = "sync"

    def __post_init__(self) -> None:
        if type(self.workers) is not int or self.workers < 1:
            raise InvalidOption(f"Invalid workers: {self.workers!r}. Must be an int of at least 1.", field="workers")
        if type(self.deadline_s) not in (int, float) or not 0 < self.deadline_s <= LONGEST_DEADLINE_S:
            raise InvalidOption(
                f"Invalid deadline_s: {self.deadline_s!r}. Must be seconds above 0, at most a week.", field="deadline_s"
            )


Consistency = Async | Sync
MODES: Mapping[str, type[Async] | type[Sync]] = {each.mode: each for each in (Async, Sync)}


def to_options(consistency: Consistency) -> dict[str, str | int | float]:
    """Return the mode as the plain document that travels."""
    return {"mode": consistency.mode, **asdict(consistency)}


def from_options(options: Mapping[str, object]) -> Consistency:
    """Return the mode that a document describes.

    Raises:
        InvalidOption: on a mode or an option that nobody knows, and on values out of range.
    """
    rest = dict(options)
    mode = rest.pop("mode", None)
    kind = MODES.get(str(mode))
    if kind is None:
        raise InvalidOption(f"Unknown consistency mode {mode!r}; there are {', '.join(MODES)}.", field="mode")
    unknown = set(rest) - set(kind.__dataclass_fields__)
    if unknown:
        raise InvalidOption(
            f"Unknown option {sorted(unknown)[0]!r} of consistency mode {mode!r}.", field=sorted(unknown)[0]
        )
    try:
        return kind(**rest)  # type: ignore[arg-type]  # the record checks its own values
    except TypeError as exc:
        raise InvalidOption(f"Consistency mode {mode!r} needs all of its options.", field="consistency") from exc
