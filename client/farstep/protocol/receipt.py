"""Receipts: the outcome of a write, which a session commits, answers with, and repeats to a retry.

A `StepReport` adds bytes and times for the worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

from farstep.protocol import Names
from farstep.protocol.policies import GRAD_NORM, Facts, facts

Reason = Literal["", "skipped", "late", "stale", "accumulated", "nonfinite"]
"""Why a push did not change the parameters; "" if it did.

skipped        a worker said that its gradients overflowed
late           the step it belongs to was taken without it
stale          its gradients were computed on parameters that are too old
accumulated    its gradients wait, and count in a step to come
nonfinite      the gradients hold NaN or Inf, by themselves or once summed, and the session skips such steps
"""

Ran = Literal["reference", "fused", "mixed"]
"""The kernel that ran a step; `mixed` if the fused kernel failed midway and the reference kernel finished it."""

Outcome = Reason | Literal["rolled_back"]
"""The same for a worker, whose push a session that went back to an older version has never seen."""

_NOBODY = Names()
FEW = 8
"""Names that are packed faster than they are found packed."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The outcome of a write. A retry gets the receipt of the first attempt.

    Attributes:
        version: the session's version after the write.
        base: the version the gradient was computed on.
        staleness: steps between `base` and the parameters the gradient was applied to.
        applied: whether the parameters changed by it.
        contributors: the workers whose gradients made the step, in the order of the reduction.
        divisor: what the sum of the gradients was divided by.
        kernel: the kernel that ran, so that a replay gives the same bits.
        again: the step continues with another evaluation, at the new parameters.
        reason: why nothing was applied.
        detail: the same as a sentence, which names the worker and the tensor where there is one.
        weight: what the gradient counted, or the learning rate was multiplied by, because it was stale.
        facts: what the session's policies say of the step's gradients, such as `grad_norm`.
        disagreement: where the workers of the step named different options, and which were used, as a sentence.
    """

    version: int
    base: int
    staleness: int = 0
    applied: bool = True
    contributors: Names = _NOBODY
    divisor: int = 1
    kernel: str = ""
    again: bool = False
    reason: Reason = ""
    detail: str = ""
    weight: float = 1.0
    facts: Facts = ()
    disagreement: str = ""

    @property
    def grad_norm(self) -> float | None:
        """Return the norm of the step's gradients before they were clipped, where the session clips by it."""
        return dict(self.facts).get(GRAD_NORM)

    @property
    def counts(self) -> bool:
        """Return whether the write has changed the parameters, or will."""
        return self.applied or self.reason == "accumulated"

    def to_header(self) -> dict[str, Any]:
        header: dict[str, Any] = {
            "version": self.version,
            "base": self.base,
            "staleness": self.staleness,
            "applied": self.applied,
            "contributors": self.contributors if len(self.contributors) > FEW else [*self.contributors],
            "divisor": self.divisor,
            "kernel": self.kernel,
        }
        if self.again:
            header["again"] = True
        if self.reason:
            header["reason"] = self.reason
        if self.detail:
            header["detail"] = self.detail
        if self.weight != 1.0:
            header["weight"] = self.weight
        if self.facts:
            header.update(self.facts)
        if self.disagreement:
            header["disagreement"] = self.disagreement
        return header

    @classmethod
    def from_header(cls, values: Mapping[str, Any]) -> Receipt:
        """Read the known entries of a receipt; later servers may send more."""
        known = {name: values[name] for name in cls.__slots__ if name in values}
        known["contributors"] = Names(values["contributors"])
        known["facts"] = tuple((name, values[name]) for name in facts() if name in values)
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The report of one `step()`.

    Attributes:
        version: the session's version after it.
        staleness: steps between the version the gradient was computed on and the one it was applied to.
        applied: whether the parameters changed by it.
        reason: why they did not: `skipped` by a worker whose gradients overflowed, `late`, `stale`, `accumulated`,
            `nonfinite`, or `rolled_back`, where the session went back and that is accepted; "" if they did. After a
            `late` or `stale` one (see `farstep.Sync` and `farstep.Bounded`) the parameters are the session's present
            ones, and training goes on from there.
        detail: the same as a sentence, which names the worker and the tensor where there is one.
        facts: what the session's policies say of the step's gradients, by name; `grad_norm` is one of them.
        disagreement: where the workers of the step named different options, and which were used, as a sentence; ""
            where they did not. A Python warning says it, too.
        duplicate: whether the server had seen this push before, so that this is the receipt of the first attempt.
        earlier: the outcome of an earlier write that got no answer and was not repeated: `applied`, or `dropped`
            because it never arrived or its barrier timed out. None without one.
        contributors: the workers whose gradients made the step.
        divisor: what the sum of the gradients was divided by.
        kernel: `reference` or `fused`.
        again: the step continues with another evaluation of the closure, at the new parameters.
        weight: what the gradient counted, or the learning rate was multiplied by, because it was stale.
        bytes_sent: payload bytes of the gradients.
        bytes_received: payload bytes of the parameters.
        attempts: the number of times the push was sent.
        bytes_overlapped: the bytes of `bytes_sent` that had been sent when `step()` began.
        overlap: `streamed` if the push was sent during the backward pass; the reason if that was given up and the step
            sent an ordinary push; "" if it was not tried.
        durability: what the server keeps of the session on its disk, such as `journal:os`; "none" in an embedded
            session, "" from a server of an older release.
        path: how the tensors moved: `bodies` of requests, or `shared memory`; "" if none did.
        seconds: seconds by activity: `total`; on the server `queue` (waiting for its turn), `receive`, `check` (for NaN
            and Inf), `barrier`, `kernel`; and here `send`, the arrival of the answer as the client saw it, and `copy`,
            into the parameters.
    """

    version: int
    staleness: int = 0
    applied: bool = True
    duplicate: bool = False
    earlier: Literal["applied", "dropped"] | None = None
    contributors: tuple[str, ...] = ()
    divisor: int = 1
    kernel: str = ""
    again: bool = False
    reason: Outcome = ""
    detail: str = ""
    weight: float = 1.0
    facts: Mapping[str, float] = field(default_factory=dict)
    disagreement: str = ""
    bytes_sent: int = 0
    bytes_received: int = 0
    attempts: int = 1
    bytes_overlapped: int = 0
    overlap: str = ""
    durability: str = ""
    path: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def grad_norm(self) -> float | None:
        """Return the norm of the step's gradients before they were clipped, where the session clips by it."""
        return self.facts.get(GRAD_NORM)

    @classmethod
    def of(
        cls,
        receipt: Mapping[str, Any],
        *,
        duplicate: bool,
        earlier: Literal["applied", "dropped"] | None,
        bytes_sent: int,
        bytes_received: int,
        attempts: int,
        seconds: Mapping[str, float],
        path: str = "",
        durability: str = "",
    ) -> StepReport:
        """Return the report of a step from its receipt's header and the worker's own measurements."""
        return cls(
            **{name: receipt[name] for name in _OF_RECEIPT if name in receipt},
            contributors=tuple(receipt["contributors"]),
            facts={name: receipt[name] for name in facts() if name in receipt},
            duplicate=duplicate,
            earlier=earlier,
            bytes_sent=bytes_sent,
            bytes_received=bytes_received,
            attempts=attempts,
            path=path,
            durability=durability,
            seconds=seconds,
        )


_OF_RECEIPT: Final = tuple(
    each.name
    for each in fields(Receipt)
    if each.name in StepReport.__slots__ and each.name not in ("contributors", "facts")
)
"""Members of a receipt that a report has as they are."""
