"""Sessions that grow by param groups: a named write like any other, and what it means for the other workers."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from farstep.errors import (
    FarstepError,
    Fenced,
    IdempotencyMismatch,
    InvalidOption,
    LimitExceeded,
    NotInitialised,
    OptionsDiffer,
    SequenceGap,
    SessionLost,
    TensorMismatch,
    Unavailable,
)
from farstep.protocol.receipt import Receipt
from farstep_service.layout import MAX_SEGMENTS
from farstep_service.optimizers.rule import AnyRule, KernelSignature
from farstep_service.plan import MAX_GROUPS
from farstep_service.session import Outcome, Session
from tests.session.failing import FailingKernels
from tests.session.writers import Twin, Writer, begun, equal, error, new_session, parameters, receipt, sync, values

LATE = {"late.w": torch.linspace(-1, 1, 6).view(2, 3), "late.z": torch.tensor([1 + 2j, -1j])}
LATER = {"later": torch.ones(4)}


def untouched(session: Session) -> tuple[int, int, int]:
    return session.version, len(session.plan.groups), len(session.plan.layout.segments)


def add_to(twin: Twin, tensors: Iterable[Tensor], lr: float) -> None:
    late = [each.clone() for each in tensors]
    twin.optimizer.add_param_group({"params": late, "lr": lr})
    twin.parameters += late


# -- growing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["Adagrad", "Adam", "ASGD"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_session_grows_as_torch_does(optimizer: str, steps: int) -> None:
    """A group with options of its own, before or after steps: one version more, and then torch's bits."""
    session = new_session(optimizer=optimizer)
    (writer,) = begun(session)
    twin = Twin(parameters(session), optimizer)
    for step in range(steps):
        writer.push(values(session, step))
        twin.step(values(session, step))
    name = writer.named()
    assert receipt(writer.append(LATE), name) == Receipt(steps + 1, steps)
    add_to(twin, LATE.values(), 0.3)
    assert session.groups[1].to_options()["lr"] == 0.3
    assert equal(parameters(session), twin.parameters)
    for step in range(3, 6):
        gradients = values(session, step)
        writer.push(gradients)
        assert equal(parameters(session), twin.step(gradients))
    assert session.version == steps + 4


def test_options_of_the_new_group_change_as_others_do() -> None:
    """A push may change an option of a group that was added, and one that names a group beyond it is refused."""
    session = new_session()
    (writer,) = begun(session)
    writer.append(LATE)
    writer.push(values(session, 1), groups={1: {"lr": 0.7}})
    assert [each.to_options()["lr"] for each in session.groups] == [0.1, 0.7]
    with pytest.raises(InvalidOption):
        writer.push(values(session, 1), groups={2: {"lr": 0.7}})


def test_a_group_may_be_empty() -> None:
    """A param group without parameters is a group, as in torch."""
    session = new_session()
    (writer,) = begun(session)
    writer.append({})
    writer.append(LATE)
    assert untouched(session) == (2, 3, 6)
    writer.push(values(session, 1), groups={1: {"lr": 0.7}})
    assert session.version == 3


def test_readers_keep_the_version_they_hold() -> None:
    """A version that is read while the session grows stays as it is, with the parameters it had."""
    session = new_session()
    (writer,) = begun(session)
    held, _ = session.hold()
    before = [held.segment(index).clone() for index in range(4)]
    writer.append(LATE)
    writer.push(values(session, 1))
    assert len(held.buffers.layout.segments) == 4
    assert equal([held.segment(index) for index in range(4)], before)
    assert session.nbytes()["versions"] == held.buffers.nbytes
    held.release()
    assert session.nbytes()["versions"] == 0


# -- exactly once ----------------------------------------------------------------------------------------------------


def test_a_group_seen_before_gets_the_original_receipt() -> None:
    """Repeated at once or after later writes, the group is there once and the receipt is the first one."""
    session = new_session()
    (writer,) = begun(session)
    name = writer.named()
    original = receipt(writer.append(LATE), name)
    for _ in range(2):
        again = writer.append(LATE, group=1, sequence=name.sequence)
        assert again == {name: Outcome(original, duplicate=True)}
        writer.push(values(session, 1))
    assert untouched(session) == (3, 2, 6)


def test_writes_made_before_the_session_grew_get_their_receipts() -> None:
    """A push and a put of the smaller session, repeated after it grew, are known by their content all the same."""
    session = new_session()
    (writer,) = begun(session)
    gradients, fresh = values(session, 1), {"param": values(session, 2)}
    names = [writer.named(2), writer.named(3)]
    originals = [receipt(writer.push(gradients, base=0), names[0]), receipt(writer.put(fresh), names[1])]
    writer.append(LATE)
    assert writer.push(gradients, base=0, sequence=2)[names[0]] == Outcome(originals[0], duplicate=True)
    assert writer.put(fresh, sequence=3)[names[1]] == Outcome(originals[1], duplicate=True)
    writer.append(LATER)
    assert writer.push(gradients, base=0, sequence=2)[names[0]] == Outcome(originals[0], duplicate=True)
    assert session.version == 4


def test_another_content_under_a_name_that_is_taken_is_refused() -> None:
    """Other numbers, options or a push under the name of a group that was added are a mismatch."""
    session = new_session()
    (writer,) = begun(session)
    writer.append(LATE)
    with pytest.raises(IdempotencyMismatch):
        writer.append({**LATE, "late.w": torch.zeros(2, 3)}, group=1, sequence=2)
    with pytest.raises(IdempotencyMismatch):
        writer.append(LATE, group=1, options={"lr": 0.4}, sequence=2)
    with pytest.raises(IdempotencyMismatch):
        writer.push(values(session, 1), sequence=2)
    writer.push(values(session, 1))
    with pytest.raises(IdempotencyMismatch):
        writer.append(LATER, group=2, sequence=3)
    assert untouched(session) == (2, 2, 6)


def test_a_group_out_of_turn_is_refused() -> None:
    """A gap, an older epoch, another life of the session: refused, and the right write still works."""
    session = new_session()
    (old,) = begun(session)
    new = Writer.join(session)
    with pytest.raises(Fenced, match="epoch 2 is current"):
        old.append(LATE)
    with pytest.raises(SequenceGap):
        new.append(LATE, sequence=2)
    with pytest.raises(SessionLost):
        new.append(LATE, incarnation="elsewhere")
    assert untouched(session) == (0, 1, 4)
    new.append(LATE)
    assert untouched(session) == (1, 2, 6)


def test_a_session_without_parameters_cannot_grow() -> None:
    """Before the first parameters there is nothing to add to."""
    session = new_session()
    writer = Writer.join(session)
    with pytest.raises(NotInitialised):
        writer.append(LATE)


@pytest.mark.parametrize(
    ("tensors", "more", "refusal"),
    [
        (LATE, {"group": 2}, InvalidOption),
        (LATE, {"group": 0}, OptionsDiffer),
        (LATE, {"options": {"momentum": 0.9}}, InvalidOption),
        (LATE, {"options": {"lr": -1.0}}, InvalidOption),
        (LATE, {"options": {"lr": "fast"}}, InvalidOption),
        ({"w": torch.ones(3)}, {}, TensorMismatch),
        ({"": torch.ones(3)}, {}, TensorMismatch),
        ({"whole": torch.ones(3, dtype=torch.int64)}, {}, TensorMismatch),
        ({f"p{index}": torch.ones(0) for index in range(MAX_SEGMENTS - 3)}, {}, LimitExceeded),
    ],
    ids=["gap", "there", "option", "range", "type", "name twice", "no name", "dtype", "too many"],
)
def test_a_group_that_cannot_be_leaves_no_trace(
    tensors: dict[str, Tensor], more: dict[str, object], refusal: type[FarstepError]
) -> None:
    """A refused group changes nothing, and its sequence is free."""
    session = new_session()
    (writer,) = begun(session)
    before, name = parameters(session), writer.named()
    with pytest.raises(refusal):
        writer.append(tensors, **more)  # type: ignore[arg-type]
    assert untouched(session) == (0, 1, 4)
    assert equal(parameters(session), before)
    assert receipt(writer.append(LATE), name).version == 1


def test_groups_are_counted() -> None:
    """A session has a bounded number of groups."""
    session = new_session(groups=[{}] * MAX_GROUPS)
    (writer,) = begun(session)
    with pytest.raises(LimitExceeded) as raised:
        writer.append(LATE)
    assert raised.value.limit == MAX_GROUPS


class Exhausted(FailingKernels):
    """Kernels for which memory runs out when they are prepared, if they are told so."""

    failure: Exception | None = None

    def prepare(self, rule: AnyRule, forms: Iterable[KernelSignature], device: torch.device) -> None:
        if self.failure is not None:
            raise self.failure


@pytest.mark.parametrize("failure", [MemoryError("no memory is left"), RuntimeError("can't allocate memory")])
def test_a_group_without_memory_leaves_no_trace(failure: Exception) -> None:
    """Where memory is short the worker is told to try again, the others go on, and another try works."""
    kernels = Exhausted()
    session = new_session(kernels=kernels)
    writer, other = begun(session, "w0", "w1")
    before, name = parameters(session), writer.named()
    kernels.failure = failure
    with pytest.raises(Unavailable, match="no memory"):
        writer.append(LATE)
    kernels.failure = None
    assert untouched(session) == (0, 1, 4)
    assert equal(parameters(session), before)
    other.push(values(session, 1))
    assert receipt(writer.append(LATE), name) == Receipt(2, 1)


def test_an_interrupted_step_is_finished_first() -> None:
    """A step whose kernel failed midway is whole before the session grows, and its push gets its receipt."""
    kernels = FailingKernels()
    session = new_session(kernels=kernels)
    w0, w1 = begun(session, "w0", "w1")
    twin, gradients, name = Twin(parameters(session)), values(session, 1), w0.named()
    kernels.fault.at = 2
    w0.push(gradients)
    kernels.fault.at = None
    outcomes = w1.append(LATE)
    assert receipt(outcomes, name).version == 1
    assert receipt(outcomes, w1.named(1)) == Receipt(2, 1)
    assert equal(parameters(session)[:4], twin.step(gradients))


# -- the other workers -----------------------------------------------------------------------------------------------


def test_others_are_told_who_added_what_until_they_add_it_too() -> None:
    """Every other write is refused by name, changes nothing, and works when the same group has been added."""
    session = new_session()
    w0, w1 = begun(session, "w0", "w1")
    gradients = values(session, 1)
    w0.append(LATE)
    words = "Worker 'w0' added param group 1 to session 's'; worker 'w1'"
    with pytest.raises(Fenced, match=words):
        w1.push(gradients)
    with pytest.raises(Fenced, match=words):
        w1.put({"param": gradients})
    w0.push(values(session, 2))
    name, before = w1.named(), parameters(session)
    assert receipt(w1.append({key: torch.zeros_like(each) for key, each in LATE.items()}, group=1), name) == Receipt(
        2, 2, applied=False
    )
    assert equal(parameters(session), before)
    w1.push(values(session, 3))
    assert untouched(session) == (3, 2, 6)


def test_what_others_wrote_before_keeps_its_receipt() -> None:
    """A push whose answer was lost and that is repeated after the session grew gets its receipt, not a refusal."""
    session = new_session()
    w0, w1 = begun(session, "w0", "w1")
    gradients, name = values(session, 1), w1.named()
    original = receipt(w1.push(gradients, base=0), name)
    w0.append(LATE)
    assert w1.push(gradients, base=0, sequence=name.sequence)[name] == Outcome(original, duplicate=True)
    w1.append(LATE, group=1)
    assert w1.push(gradients, base=0, sequence=name.sequence)[name] == Outcome(original, duplicate=True)


def test_groups_are_learned_one_after_the_other() -> None:
    """A worker that lags by two groups adds both, in their order, and is told who added each."""
    session = new_session()
    w0, w1, w2 = begun(session, "w0", "w1", "w2")
    gradients = values(session, 1)
    w0.append(LATE)
    w2.append(LATE, group=1)
    w2.append(LATER)
    with pytest.raises(Fenced, match="Worker 'w2' added param group 2"):
        w0.push(values(session, 1)[:6])
    with pytest.raises(Fenced, match="Worker 'w0' added param group 1"):
        w1.push(gradients)
    with pytest.raises(InvalidOption, match="knows 1 groups"):
        w1.append(LATER, group=2)
    w1.append(LATE, group=1)
    with pytest.raises(Fenced, match="Worker 'w2' added param group 2"):
        w1.push(values(session, 1)[:6])
    w1.append(LATER, group=2)
    w1.push(values(session, 1))
    assert untouched(session) == (3, 3, 7)


@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        (LATE, {"lr": 0.4}, "lr of its group 1 was created as 0.3, not 0.4"),
        ({**LATE, "late.w": torch.zeros(3, 2)}, None, "parameter 4 is 'late.w' float32.2, 3. of group 1, not"),
        ({"late.w": LATE["late.w"]}, None, "it has 6 parameters, not 5"),
    ],
)
def test_another_group_in_its_place_is_refused(
    tensors: dict[str, Tensor], options: dict[str, float] | None, words: str
) -> None:
    """A second worker that adds another group is told what differs, and can still add the right one."""
    session = new_session()
    w0, w1 = begun(session, "w0", "w1")
    w0.append(LATE)
    with pytest.raises(OptionsDiffer, match=words):
        w1.append(tensors, group=1, options=options)
    w1.append(LATE, group=1)
    w1.push(values(session, 1))
    assert untouched(session) == (2, 2, 6)


def test_a_push_that_waits_at_the_barrier_is_answered() -> None:
    """Those who wait learn at once that the session grew; nothing of theirs was applied, and the barrier is empty."""
    session = new_session(consistency=sync(3))
    w0, w1, w2 = begun(session, "w0", "w1", "w2")
    start, gradients, names = parameters(session), values(session, 1), {}
    for writer in (w0, w1):
        names[writer.name] = writer.named()
        assert writer.push(gradients) == {}
    outcomes = w2.append(LATE)
    assert outcomes.keys() == {*names.values(), w2.named(1)}
    for name in names.values():
        assert isinstance(error(outcomes[name]), Fenced)
        assert "Worker 'w2' added param group 1" in str(error(outcomes[name]))
    assert session.deadline is None
    assert equal(parameters(session)[:4], start)
    for writer in (w0, w1):
        with pytest.raises(Fenced):
            writer.push(gradients)
        writer.append(LATE, group=1)
    each = values(session, 1)
    assert w0.push(each) == w1.push(each) == {}
    assert len(w2.push(each)) == 3
    assert session.version == 2


def test_a_group_beside_a_push_that_waits_is_refused() -> None:
    """A worker whose push waits has its next sequence taken; the push goes on waiting."""
    session = new_session(consistency=sync(2))
    w0, w1 = begun(session, "w0", "w1")
    name = w0.named()
    w0.push(values(session, 1))
    with pytest.raises(IdempotencyMismatch):
        w0.append(LATE)
    assert receipt(w1.push(values(session, 2)), name).version == 1
    assert untouched(session) == (1, 1, 4)


@pytest.mark.parametrize("how", ["join", "leave"])
def test_a_worker_that_joins_with_all_groups_lags_no_more(how: str) -> None:
    """A new epoch, with all groups in its plan, has nothing to add."""
    session = new_session()
    w0, w1 = begun(session, "w0", "w1")
    w0.append(LATE)
    if how == "leave":
        session.leave("w1", w1.epoch, 0.0)
    again = Writer.join(session, "w1")
    again.push(values(session, 1))
    assert untouched(session) == (2, 2, 6)
