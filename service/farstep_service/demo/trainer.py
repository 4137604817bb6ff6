"""One worker's training against a session: all remaining steps, through restarts of the server.

the server's answer        its meaning                                    the worker
a receipt                  the step is committed                          goes on
barrier_timeout            a worker was missing; nothing was applied      pulls, and takes the step again
unavailable                no answer; the step may have been committed    pulls, and goes on where the session is
session_lost               a server without a data directory restarted    rejoins with its last checkpoint
fenced, and any other      another process took its name, or an error     raises the error
                           that waiting does not repair
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from farstep.errors import BarrierTimeout, SessionLost, Unavailable
from farstep.protocol.receipt import StepReport
from farstep_service.demo.digits import accuracy_of, fingerprint_of, loss_of
from farstep_service.demo.reports import Report
from farstep_service.demo.training import Training

GIVE_UP_S = 300.0
"""How long a worker retries without a step."""
REPORT_EVERY_S = 0.2
GONE = "the session was gone"
"""How the note of a worker begins that had to join again."""


class Joined(Protocol):
    """The part of an optimizer in a session that a trainer uses."""

    @property
    def version(self) -> int: ...

    @property
    def worker(self) -> str: ...

    @property
    def last_step(self) -> StepReport | None: ...

    def zero_grad(self) -> None: ...

    def step(self) -> float | None: ...

    def pull(self) -> int: ...

    def rejoin(self, state_dict: dict[str, Any] | None = None, *, version: int | None = None) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state from which a worker recreates the session."""

    version: int
    parameters: Mapping[str, Tensor]
    optimizer: dict[str, Any]


class Trainer:
    """Train until the session has all its steps.

    Args:
        training: the training to take part in.
        index: the number of this worker, and of its shard.
        optimizer: an optimizer that has joined the session.
        model: the model of the optimizer's parameters.
        report: called with each report.
        every_s: seconds between reports within an epoch.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        training: Training,
        index: int,
        optimizer: Joined,
        model: nn.Module,
        report: Callable[[Report], None],
        *,
        every_s: float = REPORT_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._training = training
        self._index = index
        self._optimizer = optimizer
        self._model = model
        self._report = report
        self._every_s = every_s
        self._clock = clock
        self._checkpoint: Checkpoint | None = None
        self._losses: list[float] = []
        self._began: float | None = None
        self._said = self._moved = clock()
        self._now = Report(
            worker=optimizer.worker, version=optimizer.version, steps=training.steps, epoch=self._epoch()
        )

    def run(self) -> None:
        """Take all remaining steps.

        Raises:
            FarstepError: an error that neither waiting nor rejoining repairs, or no step for `GIVE_UP_S`.
        """
        self._say(note="joined the session")
        first: Callable[[], object] | None = self._save
        while first is not None or self._optimizer.version < self._training.steps:
            try:
                if first is not None:
                    first()
                    first = None
                else:
                    self._step()
            except SessionLost:
                if self._overdue():
                    raise
                first = self._rejoin
            except (BarrierTimeout, Unavailable):
                if self._overdue():
                    raise
                # The step failed, or its outcome is unknown: the session's version shows where to go on.
                first = self._rejoin if first == self._rejoin else self._optimizer.pull
        self._say(accuracy=accuracy_of(self._model, self._training.test), fingerprint=fingerprint_of(self._model))

    def _overdue(self) -> bool:
        return self._clock() - self._moved > GIVE_UP_S

    def _step(self) -> None:
        self._optimizer.zero_grad()
        loss = loss_of(self._model, self._training.batch(self._optimizer.version, self._index))
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._moved = self._clock()
        self._losses.append(loss.item())
        self._count()
        if self._epoch() > self._now.epoch:
            self._say(accuracy=accuracy_of(self._model, self._training.test))
            self._losses.clear()
            self._save()
        elif self._clock() - self._said > self._every_s:
            self._say()

    def _count(self) -> None:
        step, now = self._optimizer.last_step, self._clock()
        if step is None:
            return
        kernels = tuple(sorted({*self._now.kernels, step.kernel}))
        if self._began is None:  # the first step waited for the others to start
            self._began = now
            self._now = replace(self._now, kernels=kernels)
            return
        self._now = replace(
            self._now,
            counted=self._now.counted + 1,
            seconds=now - self._began,
            nbytes=self._now.nbytes + step.bytes_sent + step.bytes_received,
            kernels=kernels,
        )

    def _epoch(self) -> int:
        return self._optimizer.version // self._training.steps_per_epoch

    def _say(self, *, accuracy: float | None = None, fingerprint: str = "", note: str = "") -> None:
        loss = sum(self._losses) / len(self._losses) if self._losses else self._now.loss
        self._now = replace(self._now, version=self._optimizer.version, epoch=self._epoch(), loss=loss)
        self._said = self._clock()
        self._report(replace(self._now, accuracy=accuracy, fingerprint=fingerprint, note=note))

    def _save(self) -> None:
        """Keep the session's state. No step happens meanwhile: it would need this worker."""
        version = self._optimizer.version
        parameters = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._checkpoint = Checkpoint(version, parameters, self._optimizer.state_dict())

    def _rejoin(self) -> None:
        """Recreate the session from the last checkpoint, or join the one that another worker has recreated."""
        saved = self._checkpoint
        if saved is None:
            created = self._optimizer.rejoin()
        else:
            self._model.load_state_dict(saved.parameters)
            created = self._optimizer.rejoin(saved.optimizer, version=saved.version)
        self._losses.clear()
        self._say(note=f"{GONE}; " + ("created it anew" if created else "joined it again"))
