"""Gradients clipped by value or by norm, with the bits of torch's functions on the reduced gradients.

clip_value   g ← min(max(g, −c), c), element by element          torch.nn.utils.clip_grad_value_
clip_norm    g ← g · min(1, c / (‖g‖ + 1e-6)), where ‖g‖ is
             the norm of all gradients as of one vector          torch.nn.utils.clip_grad_norm_
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast, final

from farstep.errors import InvalidOption, invalid_option
from farstep.protocol.policies.policy import Facts, Gradients, Policy, check_positive

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-6
"""What `clip_grad_norm_` adds to the norm before it divides by it."""
GRAD_NORM = "grad_norm"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClipValue(Policy):
    """Clip each element.

    Attributes:
        clip_value: the largest absolute value that an element may have.
    """

    clip_value: float | None = None

    name: ClassVar[str] = "clip_value"
    looks: ClassVar[bool] = False

    def check(self) -> None:
        if self.clip_value is not None:
            check_positive("clip_value", self.clip_value)

    def check_parameter(self, name: str, *, is_complex: bool) -> None:
        if is_complex:
            raise InvalidOption(
                f"clip_value does not go with {name!r}, whose gradients are complex: they have no order.",
                remedy="Clip by clip_norm.",
                field="clip_value",
            )

    def __call__(self, gradients: Gradients) -> tuple[Gradients, Facts]:
        import torch

        value = cast(float, self.clip_value)
        return gradients.mapped(lambda source, into: torch.clamp(source, min=-value, max=value, out=into)), ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClipNorm(Policy):
    """Scale all gradients if their norm is too large, and report the norm.

    A norm that is finite shows that every gradient is. Where nothing has to be clipped the gradients are left alone,
    instead of being multiplied by 1.

    Attributes:
        clip_norm: the largest norm that the gradients of a step may have; infinity measures it and clips nothing.
        clip_norm_type: which norm, the p of the p-norm; infinity is the largest absolute value.
    """

    clip_norm: float | None = None
    clip_norm_type: float = 2.0

    name: ClassVar[str] = "clip_norm"
    facts: ClassVar[tuple[str, ...]] = (GRAD_NORM,)
    finds_nonfinite: ClassVar[bool] = True

    def check(self) -> None:
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        check_positive("clip_norm_type", self.clip_norm_type)
        if self.clip_norm is None and self.clip_norm_type != 2.0:
            raise invalid_option(
                f"Invalid clip_norm_type: {self.clip_norm_type!r}. Goes with clip_norm.", "clip_norm_type"
            )

    def __call__(self, gradients: Gradients) -> tuple[Gradients, Facts]:
        import torch

        tensors = [tensor for tensor in gradients.tensors() if tensor.numel()]
        if not tensors:
            return gradients, ((GRAD_NORM, 0.0),)
        norm = norm_of(tensors, self.clip_norm_type)
        found = norm.item()
        if not math.isfinite(found):
            gradients.check_finite()
        factor = torch.clamp(cast(float, self.clip_norm) / (norm + EPSILON), max=1.0)
        if factor.item() != 1.0:
            gradients = gradients.mapped(lambda source, into: torch.mul(source, factor, out=into))
        return gradients, ((GRAD_NORM, found),)


def norm_of(tensors: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm of tensors as of one vector: the norm of the norms of each, as torch computes it."""
    import torch

    norms = torch._foreach_norm(tensors, norm_type) if norm_type != math.inf else map(_largest, tensors)
    return cast("Tensor", torch.linalg.vector_norm(torch.stack(list(norms)), norm_type))


def _largest(tensor: Tensor) -> Tensor:
    """Return the largest absolute value, or NaN: the norm of order infinity, for which torch takes 20 times as long."""
    import torch

    if tensor.is_complex():
        return cast("Tensor", torch.linalg.vector_norm(tensor, math.inf))
    return torch.stack(tensor.aminmax()).abs().amax()
