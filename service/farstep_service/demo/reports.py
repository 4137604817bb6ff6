"""What the demo's processes print: a worker its reports, as lines for people or JSON, and the demo its result."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Record how far a worker is.

    Attributes:
        worker: its name.
        version: the session's version it holds.
        steps: the version at which the training is complete.
        epoch: how many passes over the data are complete.
        loss: mean loss of its last epoch, or of the one it is in; None before a step.
        accuracy: share of test images that its model classifies correctly, at the end of an epoch; None in between.
        counted: steps it has timed: all but the first one, which waits for the others to start.
        seconds: what these steps took, with everything between them.
        nbytes: gradients sent and parameters received in these steps.
        kernels: the kernels that ran in the session so far.
        note: anything unusual, "" mostly.
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
        """Return the report in a line; None for a line that a library printed."""
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
    """Record how fast the workers of a session are together.

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


ACCURACY_WANTED = 0.97
TOLERANCE = 1e-6
"""Largest difference of a parameter. Reference kernels give torch's bits, so 0 is expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Record what the demo measured, under the names of its JSON line.

    Attributes:
        accuracy_remote, accuracy_local: share of test images classified correctly, between 0 and 1.
        max_parameter_difference: largest absolute difference of a parameter between the two runs.
        steps: steps of each run.
        steps_per_s, mb_per_s: pace of the remote run, without starting processes; megabytes of 10⁶ bytes, all workers.
        seconds: duration of the whole demo.
        kernel: the kernels that ran on the server.
        server_kills: how often the server was killed in the middle of the training; None for a demo without chaos.
        rejoins: how often a worker had to join again because its session was gone.
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
    server_kills: int | None = None
    rejoins: int = 0

    @property
    def missed(self) -> list[str]:
        """Return a description of each target that was not met."""
        missed = []
        for name, accuracy in (("remote", self.accuracy_remote), ("local", self.accuracy_local)):
            if not accuracy >= ACCURACY_WANTED:
                missed.append(f"the {name} test accuracy is {accuracy:.2%}, not at least {ACCURACY_WANTED:.0%}")
        if not self.max_parameter_difference <= TOLERANCE:
            missed.append(f"the parameters differ by {self.max_parameter_difference:g}, not at most {TOLERANCE:g}")
        if self.server_kills is not None:
            if not self.server_kills:
                missed.append("the training ended before the server could be killed; take more --epochs")
            if self.rejoins:
                missed.append(f"workers had to join again {self.rejoins} times: the session was gone")
            if self.max_parameter_difference:
                missed.append(f"the parameters differ by {self.max_parameter_difference:g}, where no bit may")
        return missed

    @property
    def ok(self) -> bool:
        """Return whether every target was met."""
        return not self.missed

    def to_json(self) -> str:
        """Return the result as one line of JSON; what chaos adds is there with chaos only."""
        figures = asdict(self)
        if self.server_kills is None:
            del figures["server_kills"], figures["rejoins"]
        return json.dumps({**figures, "ok": self.ok})

    def __str__(self) -> str:
        pace = f"{self.steps} steps, {self.steps_per_s:.0f} steps/s, {self.mb_per_s:.0f} MB/s, {self.kernel} kernel"
        there, here = f"optimizer on a server, {self.workers} workers", f"torch.optim.{self.optimizer}, one process"
        width = max(len(there), len(here))
        lines = [
            f"{there:{width}}  test accuracy {self.accuracy_remote:.2%}  {pace}",
            f"{here:{width}}  test accuracy {self.accuracy_local:.2%}",
            f"largest parameter difference {self.max_parameter_difference:g}, {self.seconds:.0f} s in all",
            *self._survived(),
            *(f"MISSED: {each}" for each in self.missed),
        ]
        return "\n".join(lines)

    def _survived(self) -> list[str]:
        if not self.server_kills or self.missed:
            return []
        return [
            "the server was killed with SIGKILL in the middle and started again on its directory: no step was lost,",
            "none was applied twice, and every bit is that of a run without the kill",
        ]
