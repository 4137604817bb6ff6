"""What the demo measured, and whether it is what it should be."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

ACCURACY_WANTED = 0.97
TOLERANCE = 1e-6
"""Largest difference of a parameter. Reference kernels give torch's bits, so 0 is expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the demo measured, under the names of its JSON line.

    Attributes:
        accuracy_remote, accuracy_local: share of test images recognised, between 0 and 1.
        max_parameter_difference: largest absolute difference of a parameter between the two runs.
        steps: steps of each run.
        steps_per_s, mb_per_s: pace of the remote run, without starting processes; megabytes of 10⁶ bytes, all workers.
        seconds: what the whole demo took.
        kernel: the kernels that ran on the server.
    """

    accuracy_remote: float
    accuracy_local: float
    max_parameter_difference: float
    steps: int
    workers: int
    steps_per_s: float
    mb_per_s: float
    seconds: float
    optimizer: str
    kernel: str

    @property
    def missed(self) -> list[str]:
        """Return the targets that were not met, in words."""
        missed = []
        for name, accuracy in (("remote", self.accuracy_remote), ("local", self.accuracy_local)):
            if not accuracy >= ACCURACY_WANTED:
                missed.append(f"the {name} test accuracy is {accuracy:.2%}, not at least {ACCURACY_WANTED:.0%}")
        if not self.max_parameter_difference <= TOLERANCE:
            missed.append(f"the parameters differ by {self.max_parameter_difference:g}, not at most {TOLERANCE:g}")
        return missed

    @property
    def ok(self) -> bool:
        """Return whether every target was met."""
        return not self.missed

    def to_json(self) -> str:
        """Return the result as one line of JSON."""
        return json.dumps({**asdict(self), "ok": self.ok})

    def __str__(self) -> str:
        pace = f"{self.steps} steps, {self.steps_per_s:.0f} steps/s, {self.mb_per_s:.0f} MB/s, {self.kernel} kernel"
        there, here = f"optimizer on a server, {self.workers} workers", f"torch.optim.{self.optimizer}, one process"
        width = max(len(there), len(here))
        lines = [
            f"{there:{width}}  test accuracy {self.accuracy_remote:.2%}  {pace}",
            f"{here:{width}}  test accuracy {self.accuracy_local:.2%}",
            f"largest parameter difference {self.max_parameter_difference:g}, {self.seconds:.0f} s in all",
            *(f"MISSED: {each}" for each in self.missed),
        ]
        return "\n".join(lines)
