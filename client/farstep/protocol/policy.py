"""What a session does with the gradients of a step before it is taken, and with the parameters after it.

    round        one push, or the pushes of one barrier, reduced as the consistency mode says
    accumulate   k rounds are summed in their order and divided by k; the k-th makes the step
    clip_value   g ← min(max(g, −c), c), element by element
    clip_norm    g ← g · min(1, c / (‖g‖ + 1e-6)), where ‖g‖ is the norm of all gradients as of one vector
    ema          after the step: ema ← ema + (1 − d)(p − ema); after the first one, ema ← p

in this order. The formulas are those of `torch.nn.utils.clip_grad_value_` and `clip_grad_norm_`, and of
`torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from farstep.errors import InvalidOption, found_by
from farstep.protocol.plain import take_pythons_own_

EMA = "ema"
"""The name of the view that the average is."""
MOST_ROUNDS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Say what a session does around each step; without arguments, nothing.

    Attributes:
        clip_norm: the largest norm that the gradients of a step may have; infinity measures it and clips nothing.
        clip_norm_type: which norm, the p of the p-norm; infinity is the largest absolute value.
        clip_value: the largest absolute value that an element may have.
        accumulate: how many rounds make a step.
        ema: the decay of an exponential moving average of the parameters.

    Raises:
        InvalidOption: on a value that is out of range.
    """

    clip_norm: float | None = None
    clip_norm_type: float = 2.0
    clip_value: float | None = None
    accumulate: int = 1
    ema: float | None = None

    def __post_init__(self) -> None:
        take_pythons_own_(self)
        for name in ("clip_norm", "clip_norm_type", "clip_value"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0) and not (value is None and name != "clip_norm_type"):
                raise _wrong(f"Invalid {name}: {value!r:.80}. Must be a number above 0.", name)
        if self.clip_norm is None and self.clip_norm_type != 2.0:
            raise _wrong(f"Invalid clip_norm_type: {self.clip_norm_type!r}. Goes with clip_norm.", "clip_norm_type")
        if type(self.accumulate) is not int or not 1 <= self.accumulate <= MOST_ROUNDS:
            raise _wrong(
                f"Invalid accumulate: {self.accumulate!r:.80}. Must be an int from 1 to {MOST_ROUNDS}.",
                "accumulate",
            )
        if self.ema is not None and not (_is_number(self.ema) and 0 < self.ema < 1):
            raise _wrong(f"Invalid ema: {self.ema!r:.80}. Must be a number between 0 and 1.", "ema")

    @property
    def as_they_come(self) -> bool:
        """Return whether a step takes the gradients of its round as they are."""
        return self.accumulate == 1 and self.clip_norm is None and self.clip_value is None

    @property
    def views(self) -> tuple[str, ...]:
        """Return the names of what a session keeps beside parameters and optimizer state."""
        return () if self.ema is None else (EMA,)

    def to_options(self) -> dict[str, str | float]:
        """Return what is asked for as the plain document that travels; JSON has no infinity, so it is a string."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        asked = {name: value for name, value in given.items() if value != getattr(NOTHING, name)}
        return {name: "inf" if value == math.inf else value for name, value in asked.items()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Policy:
        """Return the policy that a document describes.

        Raises:
            InvalidOption: on an option that nobody knows, and on values out of range.
        """
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise InvalidOption(f"Unknown option {unknown[0]!r:.80} of a policy.", field="policy")
        given: dict[str, Any] = {name: math.inf if value == "inf" else value for name, value in options.items()}
        with found_by("server"):
            return cls(**given)

    def difference(self, other: Policy) -> str | None:
        """Say in words where another policy differs first, None if nowhere."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if mine != theirs:
                return f"its {each.name} is {mine!r}, not {theirs!r}"
        return None


def _wrong(what: str, field: str) -> InvalidOption:
    """Return the error of a policy that somebody makes in this process; `from_options` reads those of others."""
    return InvalidOption(what, field=field, side="client")


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that a float can hold, or infinity."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


NOTHING = Policy()
"""The policy of a session that was not asked for any."""
