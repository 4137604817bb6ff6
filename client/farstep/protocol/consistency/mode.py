"""A consistency mode: how the pushes of several workers become steps. What all modes have, and the simplest of them.

    Mode
    ├── Async      every push is a step of its own, applied in the order of arrival
    ├── Sync       a step is one push of each of N workers, of K of them, or of every live one       sync.py
    └── Bounded    as Async, but no worker runs more than a number of steps ahead                    bounded.py

All of them have leases: a worker is live while it pushes, pulls, joins or sends a heartbeat at least every `lease_s`,
or while a push of it waits. And all can make up for stale gradients. With tau, the versions between a gradient's base
and the parameters it is applied to:

    staleness_scaling="inverse"    1 / (1 + tau)         Zhang et al. 2016, "Staleness-aware Async-SGD", with 1 + tau
    staleness_scaling="sqrt"       1 / sqrt(1 + tau)     for their tau, so that a fresh gradient counts in full
    delay_compensation=l           g + l * g * g * (w_now - w_base), Zheng et al. 2017, "DC-ASGD"

The factor multiplies the learning rate of a step of one push, and each gradient where a step has several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Self

from farstep.errors import invalid_option
from farstep.protocol.plain import take_pythons_own_

LONGEST_DEADLINE_S = 7 * 86_400
LARGEST = 2**53
"""What a number may be at most: answers carry the mode, and a larger one would not fit into every number there."""
StalenessScaling = Literal["none", "inverse", "sqrt"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Mode:
    """What all modes have; not used by itself.

    Attributes:
        staleness_scaling: how less a stale gradient counts: "none" (not less), "inverse" or "sqrt".
        delay_compensation: the strength of DC-ASGD, 0 for none. The session then keeps, for each live worker, the
            version of the parameters that it last received: up to one more copy of the parameters for each of them.
        lease_s: seconds without a push, a pull, a join or a heartbeat after which a worker is not live: not waited
            for, and its place may be taken. Whatever it sends next makes it live again.

    Raises:
        InvalidOption: a value out of range, or both ways to make up for staleness.
    """

    staleness_scaling: StalenessScaling = "none"
    delay_compensation: float = 0.0
    lease_s: float = 60.0

    mode: ClassVar[str] = ""
    """The name that travels."""
    shown: ClassVar[str] = ""
    """How it is written, for those who are told which modes there are."""

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
        """Return whether a worker that says nothing keeps others waiting."""
        return False

    @property
    def alone(self) -> bool:
        """Return whether each step is one push, whose gradients are never added to others'."""
        return False

    @property
    def places(self) -> int | None:
        """Return how many workers there is room for, None for any number."""
        return None

    @property
    def fewest(self) -> int:
        """Return how many workers it takes at least to make a step."""
        return 1

    @property
    def longest_wait_s(self) -> float:
        """Return how long a push may wait for those of others."""
        return 0.0

    def for_one(self) -> Self:
        """Return the mode as it is for a worker that is alone."""
        return self

    def factor(self, staleness: int) -> float:
        """Return what a gradient of that staleness counts."""
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
    """Return the options of a mode that are not as they are by default."""
    said = ((each, getattr(mode, each.name)) for each in fields(mode))
    return {each.name: value for each, value in said if value != each.default}


def check_seconds(name: str, seconds: float) -> None:
    """Refuse what is no time that a worker may have to wait.

    Raises:
        InvalidOption: naming the option.
    """
    if type(seconds) not in (int, float) or not 0 < seconds <= LONGEST_DEADLINE_S:
        raise invalid_option(f"Invalid {name}: {seconds!r:.80}. Must be seconds above 0, at most a week.", name)
