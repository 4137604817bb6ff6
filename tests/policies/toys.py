"""Policies that farstep does not have: the signs of gradients, and gradients scaled to a root mean square."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from farstep.errors import InvalidOption, invalid_option
from farstep.protocol.policies import Facts, Gradients, Policy, check_positive


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sign(Policy):
    """Step along the signs of the gradients, as signSGD does.

    Attributes:
        sign: whether to.
    """

    sign: bool = False

    name: ClassVar[str] = "sign"
    looks: ClassVar[bool] = False

    def check(self) -> None:
        if type(self.sign) is not bool:
            raise invalid_option(f"Invalid sign: {self.sign!r:.80}. Must be a bool.", "sign")

    def check_parameter(self, name: str, *, is_complex: bool) -> None:
        if is_complex:
            raise InvalidOption(f"sign does not go with {name!r}, whose gradients are complex.", field="sign")

    def __call__(self, gradients: Gradients) -> tuple[Gradients, Facts]:
        return gradients.mapped(lambda source, into: torch.sign(source, out=into)), ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rms(Policy):
    """Scale all gradients so that the root of the mean of their squares is a number, and say what it was.

    Attributes:
        rms: that number.
    """

    rms: float | None = None

    name: ClassVar[str] = "rms"
    facts: ClassVar[tuple[str, ...]] = ("grad_rms", "elements")
    finds_nonfinite: ClassVar[bool] = True

    def check(self) -> None:
        if self.rms is not None:
            check_positive("rms", self.rms)

    def __call__(self, gradients: Gradients) -> tuple[Gradients, Facts]:
        assert self.rms is not None
        tensors = gradients.tensors()
        elements = sum(tensor.numel() for tensor in tensors)
        squares = sum(torch.linalg.vector_norm(tensor).item() ** 2 for tensor in tensors)
        found = math.sqrt(squares / max(1, elements))
        if not math.isfinite(found):
            gradients.check_finite()
        if found > 0.0:
            factor = self.rms / found
            gradients = gradients.mapped(lambda source, into: torch.mul(source, factor, out=into))
        return gradients, (("grad_rms", found), ("elements", float(elements)))
