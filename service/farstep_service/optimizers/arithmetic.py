"""The arithmetic of the rules, once for eager and compiled kernels.

Eagerly a scalar is a Python float, and each function is the very torch operation that `torch.optim` (`foreach=False`)
uses, so the bits are torch's. In a compiled kernel a scalar is a 0-dim float64 tensor, which those operations do not
take, and a condition on it selects values instead of branching, so that one program serves all options: on and off
costs nothing in a kernel that waits for memory.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from farstep.protocol.fields import PRECISIONS, SINGLE
from farstep.protocol.memory import TORCH_DTYPES
from farstep_service.optimizers.rule import Scalar


def add(x: Tensor, y: Tensor, alpha: Scalar) -> Tensor:
    """Return `x + alpha * y`."""
    if isinstance(alpha, Tensor):
        return x + alpha * y
    return torch.add(x, y, alpha=alpha)


def add_(x: Tensor, y: Tensor, alpha: Scalar) -> Tensor:
    """Return `x + alpha * y`, in the memory of `x` if that saves any."""
    if isinstance(alpha, Tensor):
        return x + alpha * y
    return x.add_(y, alpha=alpha)


def addcmul_(x: Tensor, a: Tensor, b: Tensor, value: Scalar) -> Tensor:
    """Return `x + value * a * b`, in the memory of `x` if that saves any."""
    if isinstance(value, Tensor):
        return x + value * a * b
    return x.addcmul_(a, b, value=value)


def addcmul(x: Tensor, a: Tensor, b: Tensor, value: Scalar) -> Tensor:
    """Return `x + value * a * b`."""
    if isinstance(value, Tensor):
        return x + value * a * b
    return torch.addcmul(x, a, b, value=value)


def addcdiv(x: Tensor, a: Tensor, b: Tensor, value: Scalar) -> Tensor:
    """Return `x + value * a / b`."""
    if isinstance(value, Tensor):
        return x + value * a / b
    return torch.addcdiv(x, a, b, value=value)


def divided(x: Tensor, by: Scalar) -> Tensor:
    """Return `x / by`."""
    if isinstance(by, Tensor):
        return x * by.reciprocal()
    return x / by


def lerp(x: Tensor, y: Tensor, weight: Scalar) -> Tensor:
    """Return `x + weight * (y - x)`."""
    if isinstance(weight, Tensor):
        return x + weight * (y - x)
    return torch.lerp(x, y, weight)


def signed(g: Tensor, sign: Scalar) -> Tensor:
    """Return `g` for the sign 1 and `-g` for -1, which is what `maximize` asks for."""
    if isinstance(sign, Tensor):
        return g * sign
    return g if sign == 1 else -g


def decayed(g: Tensor, p: Tensor, weight_decay: Scalar) -> Tensor:
    """Return `g + weight_decay * p`, and `g` itself without weight decay, even where `p` is infinite."""
    if isinstance(weight_decay, Tensor):
        return torch.where(weight_decay != 0, g + weight_decay * p, g)
    return g if weight_decay == 0 else torch.add(g, p, alpha=weight_decay)


def shrunk(p: Tensor, factor: Scalar) -> Tensor:
    """Return `factor * p`, and `p` itself for the factor 1: weight decay that is decoupled from the gradient."""
    if isinstance(factor, Tensor):
        return p * factor
    return p if factor == 1 else p * factor


def sign_of(maximize: bool) -> float:
    """Return the scalar that `signed` takes."""
    return -1.0 if maximize else 1.0


def decay_of(weight_decay: float, lr: float, *, decoupled: bool) -> tuple[float, float]:
    """Return the scalars that `decayed` and `shrunk` take."""
    if decoupled:
        return 0.0, 1 - lr * weight_decay if weight_decay != 0 else 1.0
    return weight_decay, 1.0


def root(number: float) -> float:
    """Return the square root, as Python's power has it.

    Raises:
        ArithmeticError: the number is negative; its power would be complex.
    """
    if number < 0:
        raise ArithmeticError(f"{number} has no real root")
    return float(number**0.5)


def float32(number: float | complex) -> float:
    """Round as torch's state tensors do; a power of a negative base is complex, of which they keep the real part."""
    return ctypes.c_float(number.real).value


def rounded(number: float, precision: int) -> float:
    """Round as a state tensor of torch does that has one of the dtypes in `farstep.protocol.fields.PRECISIONS`."""
    if precision == SINGLE:
        return float32(number)
    return float(torch.tensor(number, dtype=TORCH_DTYPES[PRECISIONS[precision]], device="cpu"))
