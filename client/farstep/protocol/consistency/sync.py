"""Sync: a step is one push of each of N workers, of K of N (backup workers), or of every live one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from farstep.errors import invalid_option
from farstep.protocol.consistency.mode import LARGEST, Mode, check_seconds


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Sync(Mode):
    """Take one step per push of each worker, summed in the order of their names and divided by their number.

    `workers=N`: a step waits for all N. If the deadline passes first, no gradients are applied and every waiting worker
    gets an error. If one worker skips the step, because its scaled gradients overflowed, all of them do, once all have
    pushed.

    `workers=N, quorum=K`: a step is taken as soon as K pushes have arrived (backup workers, Chen et al. 2016) and
    divided by the number of contributors. Deadlines are as above.

    `workers="live"`: a step waits for every live worker, but not for one that leaves, whose lease runs out, or that is
    missing at the deadline: the step is taken with the gradients that have arrived.

    A push is late if its gradient is older than a step that was taken without its worker.

    Attributes:
        workers: the number of places for workers; "live" for any number.
        quorum: the number of pushes that make a step; None for those of all workers.
        deadline_s: seconds from the first push of a step until the wait ends.
        late: "refuse" answers a late push with the present parameters and does not apply it (`last_step.applied` is
            false, `last_step.reason` "late"); "fold" counts it as its worker's push for the present step.

    Raises:
        InvalidOption: a worker count below 1, a quorum out of range, a deadline that is not positive or over a week.
    """

    workers: int | Literal["live"]
    quorum: int | None = None
    deadline_s: float = 60.0
    late: Literal["refuse", "fold"] = "refuse"

    mode: ClassVar[str] = "sync"
    shown: ClassVar[str] = "farstep.Sync(workers=...)"

    def __post_init__(self) -> None:
        super(Sync, self).__post_init__()  # with slots the class is created twice, and super() alone names the first
        workers, quorum = self.workers, self.quorum
        if not _is_live(workers) and (type(workers) is not int or not 1 <= workers <= LARGEST):
            raise invalid_option(
                f"Invalid workers: {workers!r:.80}. Must be an int from 1 to 2**53, or 'live'.", "workers"
            )
        if quorum is not None and (type(quorum) is not int or workers == "live" or not 1 <= quorum <= workers):
            raise invalid_option(
                f"Invalid quorum: {quorum!r:.80}. Must be an int from 1 to the number of workers; with workers='live' "
                "there is none.",
                "quorum",
            )
        check_seconds("deadline_s", self.deadline_s)
        if self.late not in ("refuse", "fold"):
            raise invalid_option(f"Invalid late: {self.late!r:.80}. There are refuse and fold.", "late")

    @property
    def waits_for_others(self) -> bool:
        """Return whether a step may need more than one worker."""
        return self.workers != 1

    @property
    def longest_wait_s(self) -> float:
        """Return the deadline."""
        return self.deadline_s

    def for_one(self) -> Sync:
        """Return a mode of one worker with the same deadline and lease."""
        return Sync(workers=1, deadline_s=self.deadline_s, lease_s=self.lease_s)

    @property
    def places(self) -> int | None:
        """Return the largest number of workers, None for any number."""
        return None if self.workers == "live" else self.workers

    @property
    def partial(self) -> bool:
        """Return whether a step can be taken without all workers."""
        return self.workers == "live" or self.quorum is not None

    @property
    def fewest(self) -> int:
        """Return how many workers it takes at least to make a step."""
        return 1 if self.workers == "live" else self.quorum or self.workers


def _is_live(workers: object) -> bool:
    """Return whether the argument is "live"; a plain comparison with an array has no truth value."""
    return isinstance(workers, str) and workers == "live"
