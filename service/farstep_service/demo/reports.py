"""What a worker process says on its standard output: a line for people, or JSON for the process that watches it."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Say how far a worker is.

    Attributes:
        worker: its name.
        version: the session's version it holds.
        steps: the version at which the training is complete.
        epoch: how many passes over the data are complete.
        loss: mean loss of its last epoch, or of the one it is in; None before a step.
        accuracy: share of test images its model recognises, at the end of an epoch; None in between.
        counted: steps it has timed; the first one, which waits for the others to start, is not among them.
        seconds: what these steps took, everything between them included.
        nbytes: gradients sent and parameters received in these steps.
        kernels: the kernels that ran in the session so far.
        note: what is unusual; empty mostly.
        fingerprint: hash of its parameters, when it has finished; empty before.
    """

    worker: str
    version: int
    steps: int
    epoch: int
    loss: float | None = None
    accuracy: float | None = None
    counted: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    kernels: tuple[str, ...] = ()
    note: str = ""
    fingerprint: str = ""

    def to_json(self) -> str:
        """Return the report as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Report | None:
        """Return the report that a line holds; None for a line that some library printed."""
        try:
            document = json.loads(line)
            return cls(**{**document, "kernels": tuple(document["kernels"])})
        except (ValueError, TypeError, KeyError):
            return None

    def __str__(self) -> str:
        loss = "" if self.loss is None else f"  loss {self.loss:.4f}"
        accuracy = "" if self.accuracy is None else f"  accuracy {self.accuracy:.2%}"
        finished = "  finished" if self.fingerprint else ""
        note = f"  {self.note}" if self.note else ""
        return f"{self.worker}  epoch {self.epoch:>2}  version {self.version:>4}{loss}{accuracy}{finished}{note}"


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the workers of a session are together.

    Attributes:
        steps_per_s: steps of the session in a second.
        mb_per_s: megabytes (10⁶ bytes) of gradients and parameters that all workers moved in a second.
    """

    steps_per_s: float
    mb_per_s: float

    @classmethod
    def of(cls, reports: Collection[Report]) -> Pace:
        """Return the pace that the last reports of all workers show."""
        seconds = max((report.seconds for report in reports), default=0.0)
        if not seconds:
            return cls(0.0, 0.0)
        counted = max(report.counted for report in reports)
        return cls(counted / seconds, sum(report.nbytes for report in reports) / 1e6 / seconds)

    def __str__(self) -> str:
        return f"{self.steps_per_s:.0f} steps/s, {self.mb_per_s:.0f} MB/s"
