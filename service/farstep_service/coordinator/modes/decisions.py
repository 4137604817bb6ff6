"""What goes into a mode and what comes out of it: pushes, and decisions about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

from farstep.protocol.messages import WriteName
from farstep.protocol.receipt import Reason


class Pushed(NamedTuple):
    """A push, as far as a decision about it needs to know.

    Attributes:
        fingerprint: identifies its content.
        base: the version its gradients were computed on.
        skip: it has no gradients for this step, and asks all workers to skip it.
    """

    name: WriteName
    fingerprint: str
    base: int = 0
    skip: bool = False

    @property
    def worker(self) -> str:
        """Return who made it."""
        return self.name.worker


@dataclass(frozen=True, slots=True)
class Round:
    """What becomes of the pushes of several workers alike; not used by itself.

    Attributes:
        workers: whose they are, in the order in which they are summed.
        without: live workers that were waited for in vain, and are not waited for any more.
    """

    workers: tuple[str, ...]
    without: tuple[str, ...] = ()

    @property
    def divisor(self) -> int:
        """Return how many take part, by which the sum of the gradients is divided."""
        return len(self.workers)


@final
@dataclass(frozen=True, slots=True)
class Step(Round):
    """Reduce the pushes of these workers, in this order, divide by their number, and apply."""


@final
@dataclass(frozen=True, slots=True)
class Skip(Round):
    """Apply nothing: one of these workers skips the step, so all of them do, with one outcome."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Do not apply the push of a worker, consume its sequence, and answer it with the present parameters.

    Attributes:
        reason: `late` or `stale`.
    """

    worker: str
    reason: Reason

    @property
    def workers(self) -> tuple[str, ...]:
        """Return whom it is about."""
        return (self.worker,)


@dataclass(frozen=True, slots=True)
class Abort:
    """Give the pushes of these workers up: each gets the same answer, and may push again.

    Attributes:
        workers: who waited.
        wanted: how many would have had to be there.
        missing: who was waited for in vain.
        without: those of them who are not waited for any more.
    """

    workers: tuple[str, ...]
    wanted: int
    missing: tuple[str, ...]
    without: tuple[str, ...] = ()


Decision = Step | Skip | Refuse | Abort
