"""What one step did, as its worker is told: the session's receipt, and what the way there and back took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from farstep.receipt import Reason, Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Say what one `step()` did.

    Attributes:
        version: the session's version after it.
        staleness: steps between the version the gradient was computed on and the one it was applied to.
        applied: whether the parameters changed by it.
        reason: why they did not: `skipped` by a worker whose gradients overflowed, `late`, `stale`, `accumulated` or
            `nonfinite`; "" if they did. After a `late` or `stale` one (see `farstep.Sync` and `farstep.Bounded`) the
            parameters are the session's present ones, and training goes on from there.
        detail: the same as a sentence, which names the worker and the tensor where there is one.
        grad_norm: the norm of the step's gradients before they were clipped, where the session clips by it.
        disagreement: where the workers of the step named different options, and which were used, as a sentence; ""
            where they did not. A Python warning says it, too.
        duplicate: whether the server had seen this push before, so that this answer is the first one's receipt.
        earlier: what became of a write before this one that had got no answer and was not repeated: `applied`, or
            `dropped` because it never arrived or its barrier was given up. None if there was none.
        contributors: the workers whose gradients made the step.
        divisor: what the sum of the gradients was divided by.
        kernel: `reference` or `fused`.
        again: the step goes on with another evaluation of the closure, at the new parameters.
        weight: what the gradient counted, or the learning rate was multiplied by, because it was stale.
        bytes_sent: payload bytes of the gradients.
        bytes_received: payload bytes of the parameters.
        attempts: how often the push was sent.
        bytes_overlapped: those among `bytes_sent` that had been sent when `step()` began.
        overlap: `streamed` if the push was begun during the backward pass; why it was given up, if it had been begun
            and the step was an ordinary one; "" if it had not been begun.
        path: how the tensors moved: `bodies` of requests, or `shared memory`; "" if they did not.
        seconds: where the time went: `total`; on the server `queue` (waiting for its turn), `receive`, `check`
            (for NaN and Inf), `barrier`, `kernel`; and here `send`, the answer's way back as the client saw it, and
            `copy`, from where it arrived into the parameters.
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
    reason: Reason = ""
    detail: str = ""
    weight: float = 1.0
    grad_norm: float | None = None
    disagreement: str = ""
    bytes_sent: int = 0
    bytes_received: int = 0
    attempts: int = 1
    bytes_overlapped: int = 0
    overlap: str = ""
    path: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        receipt: Receipt,
        *,
        duplicate: bool,
        earlier: Literal["applied", "dropped"] | None,
        bytes_sent: int,
        bytes_received: int,
        attempts: int,
        seconds: Mapping[str, float],
        path: str = "",
    ) -> StepReport:
        """Return what a receipt says of a step, with what the worker knows of the way there and back."""
        return cls(
            version=receipt.version,
            staleness=receipt.staleness,
            applied=receipt.applied,
            duplicate=duplicate,
            earlier=earlier,
            contributors=receipt.contributors,
            divisor=receipt.divisor,
            kernel=receipt.kernel,
            again=receipt.again,
            reason=receipt.reason,
            detail=receipt.detail,
            weight=receipt.weight,
            grad_norm=receipt.grad_norm,
            disagreement=receipt.disagreement,
            bytes_sent=bytes_sent,
            bytes_received=bytes_received,
            attempts=attempts,
            path=path,
            seconds=seconds,
        )
