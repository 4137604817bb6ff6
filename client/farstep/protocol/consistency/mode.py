"""A consistency mode: how the pushes of several workers become steps. What all modes have, and the simplest of them.

    Mode
    ├── Async      every push is a step of its own, applied in the order of arrival
    ├── Sync       a step is one push of each of N workers, of K of them, or of every live one       sync.py
    └── Bounded    as Async, but no worker runs more than a number of steps ahead                    bounded.py

All modes have leases: a worker is live while it pushes, pulls, joins or sends a heartbeat at least every `lease_s`, or
while a push of it waits. All can compensate for stale gradients. With tau, the number of versions between a gradient's
base and the parameters it is applied to:

    staleness_scaling="inverse"    1 / (1 + tau)         Zhang et al. 2016, "Staleness-aware Async-SGD", with 1 + tau
    staleness_scaling="sqrt"       1 / sqrt(1 + tau)     for their tau, so that a fresh gradient counts in full
    delay_compensation=l           g + l * g * g * (w_now - w_base), Zheng et al. 2017, "DC-ASGD"

The factor multiplies the learning rate of a step of one push, and each gradient of a step of several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Self

from farstep.errors import invalid_option
from farstep.protocol.plain import take_pythons_own_

LONGEST_DEADLINE_S = 7 * 86_400
LARGEST = 2**53
"""The largest number of an option: answers carry the mode, and JSON numbers hold larger ones inexactly."""
StalenessScaling = Literal["none", "inverse", "sqrt"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Mode:
    """Base class of the modes.

    Attributes:
        staleness_scaling: how a stale gradient is weighted: "none" (in full), "inverse" or "sqrt".
        delay_compensation: the strength of DC-ASGD, 0 for none. The session then keeps, for each live worker, the
            version of the parameters that it last received: up to one copy of the parameters per worker.
        lease_s: seconds without a push, a pull, a join or a heartbeat after which a worker is not live: others do not
            wait for it, and its place may be taken. Its next message makes it live again.

    Raises:
        InvalidOption: a value out of range, or both kinds of compensation.
    """

    staleness_scaling: StalenessScaling = "none"
    delay_compensation: float = 0.0
    lease_s: float = 60.0

    mode: ClassVar[str] = ""
    """The name on the wire."""
    shown: ClassVar[str] = ""
    """How it is written in Python, for error messages that list the modes."""

    def __post_init__(self) -> None:
        take_pythons_own_(self)
        if self.staleness_scaling not in ("none", "inverse", "sqrt"):
            raise invalid_option(
                f"Invalid staleness_scaling: {self.staleness_scaling!r:.80}. There are none, inverse and sqrt.",
                "staleness_scaling",
            )
        strength = self.delay_compensation
        if type(strength) not in (int, float) or not 0 <= strength <= LARGEST:
            raise invalid_option(
                f"Invalid delay_compensation: {strength!r:.80}. Must be a number from 0 to 2**53.",
                "delay_compensation",
            )
        if strength and self.staleness_scaling != "none":
            raise invalid_option(
                "Either staleness_scaling or delay_compensation makes up for stale gradients, not both.",
                "delay_compensation",
            )
        check_seconds("lease_s", self.lease_s)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in chosen(self).items())})"

    @property
    def waits_for_others(self) -> bool:
        """Return whether a silent worker keeps others waiting."""
        return False

    @property
    def alone(self) -> bool:
        """Return whether each step is one push, whose gradients are never added to others'."""
        return False

    @property
    def places(self) -> int | None:
        """Return the largest number of workers, None for any number."""
        return None

    @property
    def fewest(self) -> int:
        """Return how many workers it takes at least to make a step."""
        return 1

    @property
    def longest_wait_s(self) -> float:
        """Return the longest time that a push may wait for those of others."""
        return 0.0

    def for_one(self) -> Self:
        """Return the mode for a single worker."""
        return self

    def factor(self, staleness: int) -> float:
        """Return the weight of a gradient of that staleness."""
        if self.staleness_scaling == "none" or staleness <= 0:
            return 1.0
        return 1 / (1 + staleness) if self.staleness_scaling == "inverse" else 1 / math.sqrt(1 + staleness)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Async(Mode):
    """Apply every push by itself, as it arrives; for its options see `Mode`."""

    mode: ClassVar[str] = "async"
    shown: ClassVar[str] = "farstep.Async()"

    @property
    def alone(self) -> bool:
        """Return True."""
        return True


def chosen(mode: Mode) -> dict[str, str | int | float]:
    """Return the options of a mode that differ from their defaults."""
    said = ((each, getattr(mode, each.name)) for each in fields(mode))
    return {each.name: value for each, value in said if value != each.default}


def check_seconds(name: str, seconds: float) -> None:
    """Refuse a value that is no waiting time of a worker.

    Raises:
        InvalidOption: naming the option.
    """
    if type(seconds) not in (int, float) or not 0 < seconds <= LONGEST_DEADLINE_S:
        raise invalid_option(f"Invalid {name}: {seconds!r:.80}. Must be seconds above 0, at most a week.", name)
