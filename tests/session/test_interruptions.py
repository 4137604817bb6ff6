"""Steps whose kernel fails in the middle: nobody sees half of one, and it is finished before anything else happens."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from farstep.errors import FarstepError, Fenced, IdempotencyMismatch, StepInterrupted
from farstep_service.session import Session
from tests.session.failing import FailingKernels
from tests.session.writers import Twin, Writer, begun, equal, error, new_session, parameters, receipt, sync, values

BLOCKS = 6
"""w and b are 17 numbers in blocks of 4, and scale is a buffer of its own."""


@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_step_that_fails_in_the_middle_is_finished_for_the_retry(block: int) -> None:
    """At whichever block a kernel fails: its push is told so, and its retry gets the receipt of the finished step."""
    kernels = FailingKernels()
    session = new_session(names=("w", "b", "scale"), kernels=kernels)
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    writer.push(values(session, 1))
    twin.step(values(session, 1))
    gradients, name = values(session, 2), writer.named()
    kernels.fault.at = block
    outcome = writer.push(gradients)[name]
    assert isinstance(error(outcome), StepInterrupted)
    assert session.version == 1
    kernels.fault.at = None
    again = writer.push(gradients)[name]
    assert again.duplicate
    assert receipt({name: again}, name).version == 2
    assert session.version == 2
    assert equal(parameters(session), twin.step(gradients))
    writer.push(values(session, 3))
    assert equal(parameters(session), twin.step(values(session, 3)))


def test_the_fault_is_where_it_is_said_to_be() -> None:
    """A step takes as many blocks as the test above tries; one more does not fail."""
    kernels = FailingKernels()
    session = new_session(names=("w", "b", "scale"), kernels=kernels)
    (writer,) = begun(session)
    kernels.fault.at = BLOCKS
    name = writer.named()
    assert receipt(writer.push(values(session, 1)), name).version == 1


def read(session: Session, writer: Writer) -> None:
    held, _ = session.hold()
    assert held.version == 1
    held.release()


def copy(session: Session, writer: Writer) -> None:
    contents, _ = session.copy(["param", "sum", "step"])
    assert contents.numbers["step"].tolist() == [1.0, 1.0]


def change_options(session: Session, writer: Writer) -> None:
    session.set_groups({0: {"lr": 9.0}})


def put(session: Session, writer: Writer) -> None:
    writer.last += 1
    name = writer.named()
    assert receipt(writer.put({"sum": values(session, 7)}), name).version == 2


def push_of_another(session: Session, writer: Writer) -> None:
    other = Writer.join(session, "w9")
    assert receipt(other.push([None, None]), other.named(1)).version == 2


@pytest.mark.parametrize("then", [read, copy, change_options, put, push_of_another])
@pytest.mark.parametrize("block", [0, 2])
def test_nothing_overtakes_a_step_that_failed(block: int, then: Callable[[Session, Writer], None]) -> None:
    """Reads, copies, puts, changed options and other pushes find the step finished, with the options it began with."""
    kernels = FailingKernels()
    session = new_session(names=("w", "b"), kernels=kernels)
    (writer,) = begun(session)
    start, gradients, name = parameters(session), values(session, 1), writer.named()
    kernels.fault.at = block
    writer.push(gradients)
    kernels.fault.at = None
    then(session, writer)
    assert equal(parameters(session), Twin(start).step(gradients))
    writer.last = 1
    assert writer.push(gradients, sequence=name.sequence)[name].duplicate


def test_all_workers_of_a_sync_step_share_its_fate() -> None:
    """A sync step that fails is told to everyone, and everyone's retry gets the receipt of the one step."""
    kernels = FailingKernels()
    session = new_session(names=("w", "b"), consistency=sync(2), kernels=kernels)
    w0, w1 = begun(session, "w0", "w1")
    start, mine, theirs = parameters(session), values(session, 1), values(session, 2)
    names = (w0.named(), w1.named())
    kernels.fault.at = 2
    w0.push(mine)
    outcomes = w1.push(theirs)
    assert outcomes.keys() == set(names)
    assert all(isinstance(error(outcome), StepInterrupted) for outcome in outcomes.values())
    kernels.fault.at = None
    assert receipt(w1.push(theirs, sequence=names[1].sequence), names[1]).contributors == ("w0", "w1")
    assert receipt(w0.push(mine, sequence=names[0].sequence), names[0]).version == 1
    assert equal(parameters(session), Twin(start).step([(a + b) / 2 for a, b in zip(mine, theirs, strict=True)]))


def test_a_step_that_cannot_be_finished_stays_the_next_thing_to_do() -> None:
    """While finishing fails, everything is answered StepInterrupted and nothing changes; then the step is finished."""
    kernels = FailingKernels(finish_fails=2)
    session = new_session(names=("w", "b"), kernels=kernels)
    (writer,) = begun(session)
    start_twin = Twin(values(session, 0))
    gradients, name = values(session, 1), writer.named()
    kernels.fault.at = 1
    writer.push(gradients)
    kernels.fault.at = None
    with pytest.raises(StepInterrupted):
        writer.push(gradients)
    with pytest.raises(StepInterrupted):
        session.hold()
    assert session.version == 0
    assert writer.push(gradients)[name].duplicate
    assert equal(parameters(session), start_twin.step(gradients))


def test_where_a_worker_stands_counts_the_step_that_failed() -> None:
    """A worker that asks where it stands is not told that its interrupted push is free, since it will be applied."""
    kernels = FailingKernels()
    session = new_session(names=("w", "b"), kernels=kernels)
    (writer,) = begun(session)
    name = writer.named()
    kernels.fault.at = 1
    writer.push(values(session, 1))
    kernels.fault.at = None
    assert session.position("w0") == (writer.epoch, name.sequence, False)


@pytest.mark.parametrize("how", ["join", "leave"])
def test_a_new_epoch_does_not_inherit_an_interrupted_push(how: str) -> None:
    """The step that failed is recorded for the epoch it was made in; a worker that joins anew starts at one."""
    kernels = FailingKernels()
    session = new_session(names=("w", "b"), kernels=kernels)
    (writer,) = begun(session)
    kernels.fault.at = 1
    writer.push(values(session, 1))
    kernels.fault.at = None
    if how == "leave":
        session.leave("w0", writer.epoch, 0.0)
    again = Writer.join(session)
    name = again.named()
    assert receipt(again.push(values(session, 2)), name).version == 2
    with pytest.raises((Fenced, IdempotencyMismatch)):
        writer.push(values(session, 1), sequence=2)


@pytest.mark.parametrize("failure", [MemoryError("no memory is left"), RuntimeError("can't allocate memory")])
def test_a_step_that_cannot_begin_is_told_to_everyone(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even the beginning of a sync step fails, nobody waits for ever: all get one error, and nothing changed."""
    session = new_session(names=("w", "b"), consistency=sync(2))
    w0, w1 = begun(session, "w0", "w1")
    start, names = parameters(session), (w0.named(), w1.named())

    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as broken:
        broken.setattr("farstep_service.tensors.tensors.reduce_", fail)
        w0.push(values(session, 1))
        outcomes = w1.push(values(session, 2))
    assert outcomes.keys() == set(names)
    assert all(isinstance(outcome.result, FarstepError) for outcome in outcomes.values())
    assert equal(parameters(session), start)
    w0.push(values(session, 1))
    assert len(w1.push(values(session, 2))) == 2


def test_memory_of_gradients_that_are_being_finished_is_kept() -> None:
    """The gradients of a step that failed stay as they are until it is finished, whatever arrives meanwhile."""
    kernels = FailingKernels(finish_fails=1)
    session = new_session(names=("w", "b"), kernels=kernels)
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    gradients = values(session, 1)
    kernels.fault.at = 3
    writer.push(gradients)
    kernels.fault.at = None
    with pytest.raises(StepInterrupted):
        writer.push(values(session, 8))
    assert equal(parameters(session), twin.step(gradients))


READS: dict[str, Callable[[Session], object]] = {
    "hold": lambda session: session.hold(),
    "parameters": lambda session: session.parameters(),
    "copy": lambda session: session.copy(["param"]),
    "snapshot": lambda session: session.snapshot(),
    "record": lambda session: session.record(),
    "position": lambda session: session.position("fast"),
}


@pytest.mark.parametrize("read", READS)
def test_a_read_after_which_the_next_step_fails_too_leaves_a_session_that_goes_on(read: str) -> None:
    """The read finishes one step, the push that waited for it steps and fails midway: it is finished as well."""
    kernels = FailingKernels()
    mode: dict[str, object] = {"mode": "bounded", "staleness": 0}
    session = new_session(names=("w", "b"), kernels=kernels, consistency=mode)
    fast, slow = begun(session, "fast", "slow")
    fast.push(values(session, 1))
    waits = fast.named()
    fast.push(values(session, 2))
    kernels.fault.at = 2
    slow.push(values(session, 3))
    kernels.fault.at = 2
    READS[read](session)
    kernels.fault.at = None
    assert session.position("fast")[1] == waits.sequence
    assert session.version == 3
    if read in ("record", "position"):  # which return no outcomes: the actor resolves them
        assert receipt(session.late, waits).version == 3
