"""Every policy that changes gradients: a row for each choice of options, with what comes out by a formula in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from farstep.protocol.policies import Policy, register, unregister
from tests.policies.toys import Rms, Sign

Facts = dict[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One policy with options.

    Attributes:
        options: what an optimizer is given.
        after: returns gradients as they are after it, and its facts; they are real and dense, and may be changed.
        wrong: an option and a value that is refused, with the words of the refusal.
        takes_complex: whether parameters may be complex.
        exact: whether the formula has the policy's bits.
    """

    options: Mapping[str, Any]
    after: Callable[[list[Tensor]], tuple[Sequence[Tensor], Facts]]
    wrong: tuple[str, object, str]
    takes_complex: bool = True
    exact: bool = True

    @property
    def name(self) -> str:
        """Return what to call it in tests."""
        return "-".join(f"{name}={value}" for name, value in self.options.items())

    @property
    def written(self) -> dict[str, Any]:
        """Return the options as a session is asked for them."""
        return {name: "inf" if value == math.inf else value for name, value in self.options.items()}


def clipped(norm: float, norm_type: float = 2.0) -> Callable[[list[Tensor]], tuple[Sequence[Tensor], Facts]]:
    def after(gradients: list[Tensor]) -> tuple[Sequence[Tensor], Facts]:
        found = with_grad(gradients, lambda own: clip_grad_norm_(own, norm, norm_type, foreach=False))
        return gradients, {"grad_norm": found.item()}

    return after


def clipped_by_value(gradients: list[Tensor]) -> tuple[Sequence[Tensor], Facts]:
    with_grad(gradients, lambda own: clip_grad_value_(own, 0.3, foreach=False))
    return gradients, {}


def with_grad(gradients: Sequence[Tensor], work: Callable[[list[Tensor]], Any]) -> Any:
    """Let torch work on gradients, which it takes from parameters."""
    own = [torch.zeros_like(gradient).requires_grad_() for gradient in gradients]
    for p, gradient in zip(own, gradients, strict=True):
        p.grad = gradient
    return work(own)


def scaled(gradients: list[Tensor]) -> tuple[Sequence[Tensor], Facts]:
    flat = torch.cat([gradient.reshape(-1).double() for gradient in gradients])
    rms = flat.square().mean().sqrt().item()
    return [gradient * (0.1 / rms) for gradient in gradients], {"grad_rms": rms, "elements": float(len(flat))}


TOYS: list[type[Policy]] = [Sign, Rms]
ROWS = [
    Row({"clip_value": 0.3}, clipped_by_value, ("clip_value", 0, "number above 0"), takes_complex=False),
    Row({"clip_norm": 0.5}, clipped(0.5), ("clip_norm", -1.0, "number above 0")),
    Row(
        {"clip_norm": 0.2, "clip_norm_type": math.inf},
        clipped(0.2, math.inf),
        ("clip_norm_type", "one", "number above 0"),
    ),
    Row(
        {"sign": True},
        lambda gradients: ([gradient.sign() for gradient in gradients], {}),
        ("sign", 1, "Must be a bool"),
        takes_complex=False,
    ),
    Row({"rms": 0.1}, scaled, ("rms", math.nan, "number above 0"), exact=False),
]


def names(rows: Sequence[Row]) -> list[str]:
    return [row.name for row in rows]


@contextmanager
def toys() -> Iterator[None]:
    """Make the policies that are not farstep's known to this process, and to servers in it."""
    for kind in TOYS:
        register(kind)
    try:
        yield
    finally:
        for kind in TOYS:
            unregister(kind)
