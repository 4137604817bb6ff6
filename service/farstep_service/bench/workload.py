"""What a bench measures: parameters of given shapes, their optimizer, and the memory that a step takes.

    this process   parameters, gradients, and a buffer in which parameters arrive           3 x the parameters
    the server     two versions of the parameters, gradients on arrival, and the state      3 x, and the state
    embedded       parameters, gradients and state, all in this process

Nothing here takes that memory.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from farstep.errors import InvalidOption, invalid_option
from farstep.protocol import DTYPES
from farstep.protocol.consistency import Async, to_options
from farstep_service.layout import SegmentSpec
from farstep_service.optimizers import METHODS, RULES
from farstep_service.plan import Plan

MATRICES_ONLY = frozenset({"Muon", "Adafactor"})
"""Optimizers of whole tensors; square matrices stand for those of layers."""
UNSUPPORTED = {
    "LBFGS": "Each evaluation of its closure is one exchange: measure SGD, and multiply by the evaluations.",
    "SparseAdam": "Its cost depends on the rows that have a gradient, which only the model knows.",
}
"""Optimizers with step times that do not follow from shapes, and what to do instead."""
LARGEST_COUNT = 10**15
MOST_TENSORS = 100_000

_COUNT = re.compile(r"(\d+(?:\.\d*)?(?:[eE]\+?\d{1,2})?)([kKmMgGbBtT]?)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Workload:
    """Describe parameters and their optimizer.

    Attributes:
        optimizer: a name of `farstep.optim`.
        dtype: of parameters and gradients, such as `float32`.
        shapes: one for each parameter.

    Raises:
        InvalidOption: an unknown optimizer or dtype, or an unsupported optimizer.
    """

    optimizer: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if self.optimizer not in METHODS:
            raise _invalid("optimizer", self.optimizer, f"There are {', '.join(sorted(METHODS))}.")
        if self.optimizer in UNSUPPORTED:
            raise _invalid("optimizer", self.optimizer, UNSUPPORTED[self.optimizer])
        if self.dtype not in DTYPES or not self.dtype.startswith(("float", "bfloat")):
            known = [name for name in DTYPES if name.startswith(("float", "bfloat"))]
            raise _invalid("dtype", self.dtype, f"There are {', '.join(known)}.")
        if self.optimizer == "Muon" and any(len(shape) != 2 for shape in self.shapes):
            raise _invalid("optimizer", self.optimizer, "It takes matrices only.")

    @classmethod
    def of(cls, optimizer: str, dtype: str, parameters: int, tensors: int) -> Workload:
        """Return a workload of `tensors` vectors of about the same size, with `parameters` elements in all.

        Optimizers of whole tensors get square matrices instead, with a few elements fewer.
        """
        if not 1 <= tensors <= MOST_TENSORS:
            raise _invalid("tensors", tensors, f"There may be 1 to {MOST_TENSORS}.")
        if not tensors <= parameters <= LARGEST_COUNT:
            raise _invalid("parameters", parameters, f"There may be one for each tensor, up to {LARGEST_COUNT:.0e}.")
        each, rest = divmod(parameters, tensors)
        lengths = [each + (index < rest) for index in range(tensors)]
        shapes = [_square(length) if optimizer in MATRICES_ONLY else (length,) for length in lengths]
        return cls(optimizer, dtype, tuple(shapes))

    def scaled(self, parameters: int) -> Workload:
        """Return a workload of about `parameters` elements in as many tensors as this one, or one element in each."""
        return Workload.of(self.optimizer, self.dtype, parameters, min(len(self.shapes), parameters))

    @cached_property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(map(math.prod, self.shapes))

    @property
    def itemsize(self) -> int:
        """Return the bytes of one parameter."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Return the bytes of the parameters; the gradients take as many."""
        return self.parameters * self.itemsize

    @cached_property
    def state_bytes(self) -> int:
        """Return the bytes of the optimizer's state at most, with every option that needs state."""
        plan = Plan.build(
            name="bench",
            optimizer=self.optimizer,
            groups=[{}],
            segments=[SegmentSpec(str(index), shape, self.dtype, 0) for index, shape in enumerate(self.shapes)],
            consistency=to_options(Async()),
            nonfinite="refuse",
            kernel="auto",
        )
        return plan.rule.state_bytes(plan.layout, plan.groups)

    @property
    def fuses(self) -> bool:
        """Return whether the optimizer has a fused kernel."""
        return "fused" in RULES[self.optimizer].kernels

    def document(self) -> dict[str, Any]:
        """Return the workload as `--json` prints it."""
        return {
            "optimizer": self.optimizer,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "tensors": len(self.shapes),
            "bytes": self.nbytes,
        }


def count_of(text: str) -> int:
    """Parse a number of parameters: `25M`, `2.5k`, `1e9`, `7B`.

    Raises:
        InvalidOption: the text is no such number.
    """
    found = _COUNT.fullmatch(text.strip().replace("_", "").replace(",", ""))
    if found is None:
        raise _invalid("parameters", text, "Write 25M, 2.5k, 1e9 or 7B.")
    amount = float(found[1]) * _UNITS[found[2].lower()]
    if not 1 <= amount <= LARGEST_COUNT:
        raise _invalid("parameters", text, f"There may be 1 to {LARGEST_COUNT:.0e}.")
    return round(amount)


def read_shapes(file: Path) -> tuple[tuple[int, ...], ...]:
    """Read shapes from a file: one per line, `64x3x7x7`; empty lines and lines that begin with # do not count.

    Raises:
        InvalidOption: the file cannot be read, or has no shape, or a line that is no shape.
    """
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise invalid_option(f"Cannot read the shapes in {file}: {reason}.", field="shapes") from exc
    shapes: list[tuple[int, ...]] = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        lengths = line.split("x")
        if not all(length.isascii() and length.isdecimal() and 0 < len(length) < 16 for length in lengths):
            raise _invalid("shapes", line, f"Line {number} of {file} must be a shape such as 64x3x7x7.")
        shapes.append(tuple(map(int, lengths)))
    if not shapes or not 1 <= sum(map(math.prod, shapes)) <= LARGEST_COUNT or len(shapes) > MOST_TENSORS:
        raise _invalid("shapes", str(file), f"Give 1 to {MOST_TENSORS} shapes, one per line, such as 64x3x7x7.")
    return tuple(shapes)


def _square(length: int) -> tuple[int, int]:
    """Return the shape of a nearly square matrix with at most `length` elements."""
    side = math.isqrt(length)
    return side, length // side


def _invalid(field: str, value: object, remedy: str) -> InvalidOption:
    return invalid_option(f"Invalid {field}: {value!r:.80}.", remedy=remedy, field=field)
