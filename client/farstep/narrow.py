"""Float32 on the wire as 16 bits: which direction, in which dtype, and the gradients on their way there.

    worker                          wire                        server
    float32 gradients    ─ cast ──► bfloat16 ─── widened ─────► float32 gradients, float32 parameters (the master)
    float32 parameters   ◄ widened  bfloat16 ◄── cast ──────────┘

Rounding is to nearest, ties to even, and widening is exact. Only float32 is narrowed: other dtypes travel as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from farstep.errors import InvalidOption, InvalidRequest, Side
from farstep.plain import take_pythons_own_

Half = Literal["bf16", "fp16"]
HALVES: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16"}
"""The wire's name of each 16-bit dtype."""
WIDE = "float32"
"""The dtype that is narrowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """Say in which dtype a worker's float32 tensors travel, in each direction.

    Attributes:
        gradients: "bf16" or "fp16" on the way to the server; None for as they are.
        parameters: the same for the way back.
    """

    gradients: Half | None = None
    parameters: Half | None = None

    def __post_init__(self) -> None:
        take_pythons_own_(self)
        for name, value in (("gradients", self.gradients), ("parameters", self.parameters)):
            if value is not None and value not in tuple(HALVES):
                raise InvalidOption(
                    f"Invalid wire: {name} as {value!r:.80}. There are bf16 and fp16.", field="wire", side="client"
                )

    @classmethod
    def of(cls, wire: Wire | str | None) -> Wire:
        """Return what an option says: a name is for both directions.

        Raises:
            InvalidOption: neither a `Wire` nor the name of a 16-bit dtype.
        """
        if isinstance(wire, Wire):
            return wire
        return cls(gradients=wire, parameters=wire)  # type: ignore[arg-type]  # which is looked at there

    def __bool__(self) -> bool:
        """Say whether anything is narrowed."""
        return bool(self.gradients or self.parameters)

    @property
    def dtypes(self) -> tuple[str | None, str | None]:
        """Return the wire's names of both, gradients first."""
        return (
            None if self.gradients is None else HALVES[self.gradients],
            None if self.parameters is None else HALVES[self.parameters],
        )


def check_half(key: str, value: str | None, *, side: Side = "server") -> str | None:
    """Return the wire's name of a 16-bit dtype, or None, as it was received.

    Raises:
        InvalidRequest: another dtype.
    """
    if value is not None and value not in HALVES.values():
        raise InvalidRequest(
            f"{key!r} is {value!r:.80}; there are {' and '.join(HALVES.values())}.", field=key, side=side
        )
    return value
