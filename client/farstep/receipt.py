"""What became of a write: what a session commits, answers with, and answers again when the write is repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from farstep.wire import Names

Reason = Literal["", "skipped", "late", "stale", "accumulated", "nonfinite"]
"""Why a push left the parameters alone; "" for one that did not.

skipped        a worker said that its gradients overflowed
late           the step it belongs to was taken without it
stale          its gradients were computed on parameters that are too old
accumulated    its gradients wait, and count in a step to come
nonfinite      the gradients hold NaN or Inf, by themselves or once summed, and the session skips such steps
"""

Ran = Literal["reference", "fused", "mixed"]
"""Which kernel ran a step; `mixed` is one whose fused kernel failed midway and that the reference kernel finished."""

_NOBODY = Names()


@dataclass(frozen=True, slots=True)
class Receipt:
    """Say what became of a write. A retry gets the receipt of the first time.

    Attributes:
        version: the session's version after the write.
        base: the version the gradient was computed on.
        staleness: steps between `base` and the parameters the gradient was applied to.
        applied: whether the parameters changed by it.
        contributors: the workers whose gradients made the step, in the order of the reduction.
        divisor: what the sum of the gradients was divided by.
        kernel: which kernel ran, so that a replay can give the same bits.
        again: the step goes on with another evaluation, at the new parameters.
        reason: why nothing was applied.
        detail: the same as a sentence, which names the worker and the tensor where there is one.
        weight: what the gradient counted, or the learning rate was multiplied by, because it was stale.
        grad_norm: the norm of the step's gradients before they were clipped, where the session clips by it.
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
    grad_norm: float | None = None
    disagreement: str = ""

    @property
    def counts(self) -> bool:
        """Return whether what was written is in the parameters, or will be."""
        return self.applied or self.reason == "accumulated"

    def to_header(self) -> dict[str, Any]:
        header: dict[str, Any] = {
            "version": self.version,
            "base": self.base,
            "staleness": self.staleness,
            "applied": self.applied,
            "contributors": self.contributors,
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
        if self.grad_norm is not None:
            header["grad_norm"] = self.grad_norm
        if self.disagreement:
            header["disagreement"] = self.disagreement
        return header

    @classmethod
    def from_header(cls, values: Mapping[str, Any]) -> Receipt:
        """Read what this side knows of a receipt; later servers may say more."""
        known = {name: values[name] for name in cls.__slots__ if name in values}
        return cls(**{**known, "contributors": Names(values["contributors"])})
