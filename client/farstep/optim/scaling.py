"""Gradients scaled by `torch.amp.GradScaler`, in sessions whose workers wait for each other.

By default GradScaler divides the gradients by the scale and calls `step()` unless one of them is Inf or NaN. A worker
whose gradients overflowed would then send nothing, and the workers at the barrier would wait for it. An optimizer that
sets `_step_supports_amp_scaling`, as torch's fused ones do, makes both decisions itself: GradScaler always calls
`step()`, having set

    grad_scale    what the gradients are to be divided by; None if that was done, by `unscale_`
    found_inf     above 0 if one of them is Inf or NaN

on the optimizer, and removes both after a `step()` that returned. Such a step is skipped by all workers if one of them
skips it. Each has a scaler of its own. A scaler passed to `RemoteOptimizer.inform` treats every step skipped for Inf or
NaN as an overflow of its own, so equal scales stay equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farstep.protocol.receipt import Reason, StepReport


@dataclass(frozen=True, slots=True)
class Scaling:
    """GradScaler's request to one step.

    Attributes:
        overflowed: whether the step is to be skipped.
        factor: the factor to multiply the gradients by, as `GradScaler.unscale_` does.
    """

    overflowed: bool = False
    factor: float = 1.0

    def unscaled(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the gradients to send. The caller's own stay scaled until the step is taken, for a retry."""
        if self.factor == 1.0:
            return gradients
        return [None if gradient is None else gradient * self.factor for gradient in gradients]

    def settle_(self, gradients: Sequence[Tensor | None]) -> None:
        """Unscale the gradients themselves, as GradScaler leaves them after each step."""
        if self.factor != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(self.factor)


NOT_SCALED = Scaling()
_BY_ITSELF = nullcontext(NOT_SCALED)
SKIPPED_FOR_INF: frozenset[Reason] = frozenset({"skipped", "nonfinite"})
"""Reasons of a skipped step for which GradScaler lowers its scale."""


def tell_(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, report: StepReport) -> None:
    """Report to a scaler the Inf for which an optimizer's step was skipped, if it was, as if it had been found here.

    GradScaler keeps its findings until `update()`, one number for each optimizer and device. Other optimizers that it
    scales take their steps.
    """
    if report.reason in SKIPPED_FOR_INF and scaler.is_enabled():
        own = scaler._per_optimizer_states.get(id(optimizer), {})
        for found in own.get("found_inf_per_device", {}).values():
            found.fill_(1.0)


def scaling_of(attributes: dict[str, Any]) -> AbstractContextManager[Scaling]:
    """Read what GradScaler set among an optimizer's attributes: nothing in a step that it does not make.

    A failing step removes these attributes, so that GradScaler can try again; otherwise GradScaler removes them.
    """
    return _set_by_scaler(attributes) if "found_inf" in attributes or "grad_scale" in attributes else _BY_ITSELF


@contextmanager
def _set_by_scaler(attributes: dict[str, Any]) -> Iterator[Scaling]:
    found, scale = attributes.get("found_inf"), attributes.get("grad_scale")
    try:
        yield Scaling(
            overflowed=bool(found),  # a plain 0 where there is no gradient at all
            factor=1.0 if scale is None else float(scale.double().reciprocal().float().item()),
        )
    except BaseException:
        attributes.pop("grad_scale", None)
        attributes.pop("found_inf", None)
        raise
