"""Policies that keep tensors from step to step: rounds that wait for others, and an average of the parameters.

    accumulate   k rounds are summed in their order and divided by k; the k-th makes the step
    ema          after the step: ema ← ema + (1 − d)(p − ema); after the first one, ema ← p
                 (`torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`)

What they keep is the session's: it is written down with it, and grows with it. So their arithmetic is the service's, in
`farstep_service.tensors`, and here is what they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from farstep.errors import invalid_option
from farstep.protocol.policies.policy import Policy, is_number

EMA = "ema"
"""The name of the average's view."""
MOST_ROUNDS = 1_000_000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulate(Policy):
    """Take a step of the mean of several rounds.

    Attributes:
        accumulate: the number of rounds that make a step.
    """

    accumulate: int = 1

    name: ClassVar[str] = "accumulate"
    looks: ClassVar[bool] = False
    changes_gradients: ClassVar[bool] = False

    def check(self) -> None:
        if type(self.accumulate) is not int or not 1 <= self.accumulate <= MOST_ROUNDS:
            raise invalid_option(
                f"Invalid accumulate: {self.accumulate!r:.80}. Must be an int from 1 to {MOST_ROUNDS}.", "accumulate"
            )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Average(Policy):
    """Keep an exponential moving average of the parameters.

    Attributes:
        ema: its decay.
    """

    ema: float | None = None

    name: ClassVar[str] = EMA
    looks: ClassVar[bool] = False
    changes_gradients: ClassVar[bool] = False

    def check(self) -> None:
        if self.ema is not None and not (is_number(self.ema) and 0 < self.ema < 1):
            raise invalid_option(f"Invalid ema: {self.ema!r:.80}. Must be a number between 0 and 1.", EMA)
