"""How the pushes of several workers become steps: the modes a session can be in.

    Sync       a step is one push of each of N workers, of K of them (backup workers), or of every live one
    Async      every push is a step of its own, applied in the order of arrival
    Bounded    as Async, but nobody runs more than a number of steps ahead (stale synchronous parallel)

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
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Self, get_args

from farstep.errors import InvalidOption, found_by, invalid_option
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
        _check_seconds("lease_s", self.lease_s)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in chosen(self).items())})"

    @property
    def waits_for_others(self) -> bool:
        """Return whether a worker that says nothing keeps others waiting."""
        return False

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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Sync(Mode):
    """Apply one step for one push of each worker, summed in the order of their names and divided by their number.

    `workers=N`: a step waits for all N. If the deadline passes first, nobody's gradients are applied and every waiting
    worker learns so. If one of the workers skips the step, because its scaled gradients overflowed, all of them do, as
    soon as all are there.

    `workers=N, quorum=K`: a step is taken as soon as K pushes are there (backup workers, Chen et al. 2016) and divided
    by the number of those who contributed. Deadlines are as above.

    `workers="live"`: a step waits for every live worker. Whoever leaves, whose lease runs out, or who is missing at the
    deadline is not waited for: the step is taken with the gradients that are there.

    Late is a push whose gradient is older than a step that was made without its worker.

    Attributes:
        workers: how many workers there is room for; "live" for any number.
        quorum: how many pushes make a step; None for those of all workers.
        deadline_s: seconds from the first push of a step until it is not waited for any more.
        late: "refuse" answers a late push with the present parameters and does not apply it (`last_step.applied` is
            false, `last_step.reason` "late"); "fold" takes it as its worker's part in the step that is being collected.

    Raises:
        InvalidOption: a worker count below 1, a quorum that cannot be, a deadline that is not positive or over a week.
    """

    workers: int | Literal["live"]
    quorum: int | None = None
    deadline_s: float = 60.0
    late: Literal["refuse", "fold"] = "refuse"

    mode: ClassVar[str] = "sync"
    shown: ClassVar[str] = "farstep.Sync(workers=...)"

    def __post_init__(self) -> None:
        super(Sync, self).__post_init__()  # slots make another class of this one, which super() alone does not know
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
        _check_seconds("deadline_s", self.deadline_s)
        if self.late not in ("refuse", "fold"):
            raise invalid_option(f"Invalid late: {self.late!r:.80}. There are refuse and fold.", "late")

    @property
    def waits_for_others(self) -> bool:
        """Return whether a step takes more than one worker, or may."""
        return self.workers != 1

    @property
    def longest_wait_s(self) -> float:
        """Return the deadline."""
        return self.deadline_s

    def for_one(self) -> Sync:
        """Return a mode of one worker with the same times."""
        return Sync(workers=1, deadline_s=self.deadline_s, lease_s=self.lease_s)

    @property
    def partial(self) -> bool:
        """Return whether a step can be made without a worker."""
        return self.workers == "live" or self.quorum is not None

    @property
    def fewest(self) -> int:
        """How many workers it takes at least to make a step."""
        return 1 if self.workers == "live" else self.quorum or self.workers


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Bounded(Mode):
    """Apply every push by itself, but let nobody run away (stale synchronous parallel, Ho et al. 2013).

    A push of a worker that has completed c steps is applied at once if c <= m + staleness, where m is the least number
    of steps that a live worker has completed. Else it waits until the slowest catches up, leaves, or its lease runs
    out. If the deadline passes first, it is not applied, and its worker learns for whom it waited. Who joins begins
    at m.

    So among N live workers no gradient is applied that misses more than 2 * (staleness + 1) * (N - 1) steps. A push of
    a worker whose lease had run out, so that the others went on, is not applied if it misses more: it is answered with
    the present parameters (`last_step.applied` is false, `last_step.reason` "stale").

    Attributes:
        staleness: how many steps a worker may be ahead of the slowest when it pushes.
        deadline_s: seconds that a push may wait.

    Raises:
        InvalidOption: a staleness below 0, or a deadline that is not positive or beyond a week.
    """

    staleness: int
    deadline_s: float = 60.0

    mode: ClassVar[str] = "bounded"
    shown: ClassVar[str] = "farstep.Bounded(staleness=...)"

    def __post_init__(self) -> None:
        super(Bounded, self).__post_init__()
        if type(self.staleness) is not int or not 0 <= self.staleness <= LARGEST:
            raise invalid_option(
                f"Invalid staleness: {self.staleness!r:.80}. Must be an int from 0 to 2**53.", "staleness"
            )
        _check_seconds("deadline_s", self.deadline_s)

    @property
    def waits_for_others(self) -> bool:
        """Return True: those who are ahead wait for the slowest."""
        return True

    @property
    def longest_wait_s(self) -> float:
        """Return the deadline."""
        return self.deadline_s

    def bound(self, workers: int) -> int:
        """Return how many steps a gradient may miss among so many live workers."""
        return 2 * (self.staleness + 1) * (workers - 1)


Consistency = Async | Sync | Bounded
MODES: Mapping[str, type[Consistency]] = {each.mode: each for each in get_args(Consistency)}
"""Every mode, by the name that travels."""


def checked(given: object) -> Consistency:
    """Return what was given as a mode, if it is one.

    Raises:
        InvalidOption: it is anything else, such as the name of one.
    """
    if not isinstance(given, Consistency):
        *first, last = (each.shown for each in MODES.values())
        raise invalid_option(
            f"Invalid consistency: {given!r:.80}.",
            remedy=f"Give {', '.join(first)} or {last}.",
            field="consistency",
        )
    return given


def chosen(mode: Mode) -> dict[str, str | int | float]:
    """Return the options of a mode that are not as they are by default."""
    said = ((each, getattr(mode, each.name)) for each in fields(mode))
    return {each.name: value for each, value in said if value != each.default}


def to_options(consistency: Consistency) -> dict[str, str | int | float]:
    """Return the mode as the plain document that travels, without what is as it is by default."""
    return {"mode": consistency.mode, **chosen(consistency)}


def from_options(options: Mapping[str, object]) -> Consistency:
    """Return the mode that a document describes.

    Raises:
        InvalidOption: on a mode or an option that nobody knows, and on values out of range.
    """
    rest = dict(options)
    mode = rest.pop("mode", None)
    kind = MODES.get(str(mode))
    if kind is None:
        raise InvalidOption(f"Unknown consistency mode {mode!r:.80}; there are {', '.join(MODES)}.", field="mode")
    unknown = sorted(set(rest) - set(kind.__dataclass_fields__))
    if unknown:
        raise InvalidOption(f"Unknown option {unknown[0]!r:.80} of consistency mode {mode!r}.", field=unknown[0][:80])
    try:
        with found_by("server"):
            return kind(**rest)  # type: ignore[arg-type]  # the record checks its own values
    except TypeError as exc:
        raise InvalidOption(f"Consistency mode {mode!r} needs all of its options.", field="consistency") from exc


def _is_live(workers: object) -> bool:
    """Return whether this is the word; an array, compared with it, has no truth."""
    return isinstance(workers, str) and workers == "live"


def _check_seconds(name: str, seconds: float) -> None:
    if type(seconds) not in (int, float) or not 0 < seconds <= LONGEST_DEADLINE_S:
        raise invalid_option(f"Invalid {name}: {seconds!r:.80}. Must be seconds above 0, at most a week.", name)
