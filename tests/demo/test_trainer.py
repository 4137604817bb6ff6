"""A worker's training goes on through everything that waiting or joining again can mend."""

from typing import Any

import pytest
import torch
from torch import nn

from farstep.errors import BarrierTimeout, FarstepError, Fenced, NonFinite, SessionLost, Unavailable
from farstep.protocol.receipt import StepReport
from farstep_service.demo.digits import build_model, fingerprint_of
from farstep_service.demo.reports import Report
from farstep_service.demo.trainer import GIVE_UP_S, Trainer
from farstep_service.demo.training import Training, local_optimizer, train_locally

TRAINING = Training(workers=1, epochs=2)


class Session:
    """A session of one worker in this process; its calls fail as a script says.

    Args:
        failures: errors by (call, how often it was called before).
        committed: a step that fails as unavailable happens, and only its answer is lost.
    """

    worker = "worker-00"

    def __init__(self, failures: dict[tuple[str, int], FarstepError], committed: bool = False) -> None:
        self.model = build_model(TRAINING.seed)
        self.version = 0
        self.last_step: StepReport | None = None
        self.rejoined: list[int | None] = []
        self._there = 0
        self._failures = dict(failures)
        self._committed = committed
        self._calls: dict[str, int] = {}
        self._optimizer = local_optimizer(TRAINING, self.model)

    def _fail(self, call: str) -> None:
        number = self._calls.get(call, 0)
        self._calls[call] = number + 1
        error = self._failures.get((call, number)) or self._failures.get((call, -1))
        if error is not None:
            raise error

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        try:
            self._fail("step")
        except Unavailable:
            if self._committed:
                self._optimizer.step()
                self._there += 1
            raise
        self._optimizer.step()
        self._there += 1
        self.version = self._there
        self.last_step = StepReport(version=self.version, kernel="reference", bytes_sent=10, bytes_received=20)

    def pull(self) -> int:
        self._fail("pull")
        self.version = self._there
        return self.version

    def rejoin(self, state_dict: dict[str, Any] | None = None, *, version: int | None = None) -> bool:
        self._fail("rejoin")
        self.rejoined.append(version)
        if state_dict is not None:
            self._optimizer.load_state_dict(state_dict)
        self.version = self._there = version or 0
        return True

    def state_dict(self) -> dict[str, Any]:
        self._fail("state_dict")
        return {**self._optimizer.state_dict(), "state": dict(self._copy())}

    def _copy(self) -> dict[int, dict[str, torch.Tensor]]:
        held = self._optimizer.state_dict()["state"]
        return {index: {key: value.clone() for key, value in own.items()} for index, own in held.items()}


def train(session: Session) -> list[Report]:
    """Train to the end and return the reports; the clock jumps at each look."""
    reports: list[Report] = []
    ticks = iter(range(10**9))
    trainer = Trainer(TRAINING, 0, session, session.model, reports.append, clock=lambda: next(ticks))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer.run()
    finally:
        torch.set_num_threads(threads)
    return reports


@pytest.fixture(scope="module")
def undisturbed() -> nn.Module:
    """Return what the training ends with when nothing happens."""
    return train_locally(TRAINING)


HALFWAY = TRAINING.steps_per_epoch + 5
LOST = SessionLost("The server restarted.")
BUSY = Unavailable("No answer.")


@pytest.mark.parametrize(
    ("failures", "committed", "rejoined"),
    [
        ({}, False, []),
        ({("step", 3): BarrierTimeout("A worker was missing.")}, False, []),
        ({("step", 3): BUSY, ("step", 4): BUSY, ("pull", 1): BUSY}, False, []),
        ({("step", 3): BUSY}, True, []),
        ({("step", HALFWAY): LOST}, False, [TRAINING.steps_per_epoch]),
        ({("step", HALFWAY): LOST, ("rejoin", 0): BUSY, ("rejoin", 1): LOST}, False, [TRAINING.steps_per_epoch]),
        ({("step", 3): BUSY, ("pull", 0): LOST}, False, [0]),
        ({("state_dict", 1): LOST}, False, [0]),
        ({("state_dict", 1): BUSY, ("step", HALFWAY): LOST}, False, [0]),
    ],
    ids=[
        "nothing",
        "a barrier times out",
        "no answer for a while",
        "the answer of a step is lost",
        "the server restarts",
        "the server restarts twice",
        "the server restarts while a step is unknown",
        "the server restarts during a checkpoint",
        "a checkpoint is missed before the server restarts",
    ],
)
def test_the_training_ends_as_if_nothing_had_happened(
    failures: dict, committed: bool, rejoined: list[int], undisturbed: nn.Module
):
    """Whatever fails and is mended, the last parameters are those of an undisturbed run, bit for bit."""
    session = Session(failures, committed)
    *_, last = train(session)
    assert last.version == TRAINING.steps
    assert last.fingerprint == fingerprint_of(session.model) == fingerprint_of(undisturbed)
    assert session.rejoined == rejoined


def test_a_session_lost_before_the_first_checkpoint_begins_anew(undisturbed: nn.Module):
    """Without a checkpoint the worker creates the session from what it has."""
    session = Session({("state_dict", 0): LOST})
    assert train(session)[-1].fingerprint == fingerprint_of(undisturbed)
    assert session.rejoined == [None]


@pytest.mark.parametrize(
    "error", [Fenced("Another process."), NonFinite("A gradient holds NaN.")], ids=lambda error: error.code
)
def test_what_waiting_does_not_mend_is_let_out(error: FarstepError):
    """A worker whose name was taken, or whose gradient is refused, ends with that error."""
    with pytest.raises(type(error)):
        train(Session({("step", 3): error}))


@pytest.mark.parametrize("error", [BUSY, BarrierTimeout("A worker was missing."), LOST], ids=lambda error: error.code)
def test_patience_ends(error: FarstepError):
    """A worker that has not stepped for the time it gives the session ends with the last error."""
    session = Session({("step", -1): error})
    with pytest.raises(type(error)):
        train(session)
    assert session._calls["step"] <= GIVE_UP_S


def test_reports_tell_the_epochs_and_the_pace():
    """Each epoch ends with a report that has the accuracy; bytes and time are counted from the second step on."""
    reports = train(Session({}))
    assert reports[0].note == "joined the session"
    ends = [report for report in reports if report.accuracy is not None and not report.fingerprint]
    assert [(report.epoch, report.version) for report in ends] == [
        (1, TRAINING.steps_per_epoch),
        (2, TRAINING.steps),
    ]
    last = reports[-1]
    assert (last.counted, last.nbytes, last.kernels) == (TRAINING.steps - 1, 30 * (TRAINING.steps - 1), ("reference",))
    assert last.seconds > 0
