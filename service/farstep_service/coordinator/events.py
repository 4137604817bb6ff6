"""What happens to a session, and what became of what it was told to do.

    who takes part     Join  Leave  Heartbeat  Receive
    writes             Push  Put  Append                        each under a name that makes it happen once
    the session        ChangeOptions  ChangeMode  DropBase  Interrupt
    time               Tick
    results            StepTaken  NoStep  Written  Failed       of the one instruction that is being carried out

An event has been admitted: what is wrong with a request is found out before (`Coordinator.check_...`), so an event
never fails and every one of them changes something. All are plain values that can be written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from farstep.errors import FarstepError
from farstep.protocol.consistency import Consistency
from farstep.protocol.growth import AppendHead
from farstep.protocol.messages import PushHead, PutHead
from farstep.protocol.policies import Facts
from farstep.protocol.receipt import Ran, Reason


@dataclass(frozen=True, slots=True)
class Join:
    """A worker joins, with all param groups; an older epoch of it is over.

    Attributes:
        named: its name was chosen, rather than drawn at random.
    """

    worker: str
    named: bool = True


@dataclass(frozen=True, slots=True)
class Leave:
    """A member gives its place up."""

    worker: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A member was heard of without a write: its lease begins anew."""

    worker: str


@dataclass(frozen=True, slots=True)
class Receive:
    """A member is being sent the present version."""

    worker: str


@dataclass(frozen=True, slots=True)
class Push:
    """The gradients of a worker arrived.

    Attributes:
        fingerprint: identifies the body: a retry has the same one, another content under the same name has not.
        nonfinite: what in them holds NaN or Inf, as a sentence, where that skips the step; "" for nothing.
    """

    head: PushHead
    fingerprint: str
    nonfinite: str = ""


@dataclass(frozen=True, slots=True)
class Put:
    """Contents of the session arrived, to replace its own."""

    head: PutHead
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Append:
    """A param group arrived.

    Attributes:
        there: the session has it already, and its worker knows it from now on.
    """

    head: AppendHead
    fingerprint: str
    there: bool = False


@dataclass(frozen=True, slots=True)
class ChangeOptions:
    """Options of param groups are changed by themselves, from the next step on."""

    changes: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ChangeMode:
    """The session goes on in another consistency mode."""

    mode: Consistency


@dataclass(frozen=True, slots=True)
class DropBase:
    """Memory is short: the oldest of the versions that are kept for workers goes."""


@dataclass(frozen=True, slots=True)
class Interrupt:
    """The server is about to end: no push waits any longer."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Join | Leave | Heartbeat | Receive | Push | Put | Append | ChangeOptions | ChangeMode | DropBase | Interrupt | Tick
)


@dataclass(frozen=True, slots=True)
class StepTaken:
    """A step was taken.

    Attributes:
        version: the version it led to.
        contributors: the workers of all rounds that made the step, in the order in which their gradients were added up.
        kernel: which kernel ran: with the same one a replay gives the same bits.
        again: the step goes on with another evaluation of the objective.
        facts: what its policies say of it.
        disagreement: where its workers named different options, as a sentence.
        switched: of a step of the kernel `mixed`, where the second kernel went on: the call and its element.
    """

    version: int
    contributors: tuple[str, ...]
    kernel: Ran
    again: bool = False
    facts: Facts = ()
    disagreement: str = ""
    switched: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class NoStep:
    """A round made no step; options that came with it hold.

    Attributes:
        reason, detail, disagreement: as in a receipt. No reason of its own where none was to be made.
        contributors: the workers of a round that was looked at, in the order of its sum.
    """

    reason: Reason = ""
    detail: str = ""
    disagreement: str = ""
    contributors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """Contents were replaced, or the session grew.

    Attributes:
        base: the version before.
        version: the version afterwards.
        applied: False if first contents came second, and changed nothing.
    """

    base: int
    version: int
    applied: bool = True


@dataclass(frozen=True, slots=True)
class Failed:
    """An instruction was not carried out, and nothing has changed, unless it is unfinished.

    Attributes:
        unfinished: a kernel failed midway; the instruction is carried out to its end before anything else happens.
    """

    error: FarstepError
    unfinished: bool = False


Result = StepTaken | NoStep | Written | Failed
