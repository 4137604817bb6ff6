"""Contents that replace a session's own: named writes like any other."""

from __future__ import annotations

import pytest
import torch

from farstep.errors import (
    FarstepError,
    IdempotencyMismatch,
    InvalidOption,
    NotInitialised,
    SequenceGap,
    TensorMismatch,
)
from farstep.protocol import Names
from farstep.protocol.receipt import Receipt
from farstep_service.session import Outcome
from tests.session.writers import Twin, Writer, begun, equal, new_session, parameters, receipt, sync, values


def test_the_first_parameters_begin_at_the_version_they_name() -> None:
    """A resumed training begins with version N, and its next step makes N + 1."""
    session = new_session()
    writer = Writer.join(session)
    name = writer.named()
    assert receipt(writer.put({"param": values(session, 0)}, initial=True, version=41), name) == Receipt(41, 41)
    assert session.version == 41
    name = writer.named()
    assert receipt(writer.push(values(session, 1)), name) == Receipt(
        42, 41, contributors=Names(("w0",)), kernel="reference"
    )


def test_the_first_parameters_are_taken_once() -> None:
    """Of two workers who bring first parameters, the second is told that its own were not applied."""
    session = new_session()
    w0, w1 = Writer.join(session, "w0"), Writer.join(session, "w1")
    w0.put({"param": values(session, 0)}, initial=True, version=7)
    before, name = parameters(session), w1.named()
    assert receipt(w1.put({"param": values(session, 5)}, initial=True), name) == Receipt(7, 7, applied=False)
    assert equal(parameters(session), before)
    assert w1.put({"param": values(session, 5)}, initial=True, sequence=1)[name].duplicate


def test_a_put_seen_before_gets_the_original_receipt() -> None:
    """A retry of a put changes nothing, also when later steps have moved on; another content is a mismatch."""
    session = new_session()
    (writer,) = begun(session)
    name = writer.named()
    fresh = {"param": values(session, 3)}
    original = receipt(writer.put(fresh), name)
    assert original == Receipt(1, 0)
    assert equal(parameters(session), fresh["param"])
    writer.push(values(session, 4))
    before = parameters(session)
    assert writer.put(fresh, sequence=name.sequence)[name] == Outcome(original, duplicate=True)
    with pytest.raises(IdempotencyMismatch):
        writer.put({"param": values(session, 9)}, sequence=name.sequence)
    with pytest.raises(SequenceGap):
        writer.put(fresh, sequence=9)
    assert equal(parameters(session), before)


def test_some_segments_are_replaced() -> None:
    """A put of two segments changes these two."""
    session = new_session()
    (writer,) = begun(session)
    before, fresh = parameters(session), values(session, 3)
    writer.put({"param": [fresh[0], fresh[2]]}, segments=[0, 1, 2, 3])
    assert equal(parameters(session), [fresh[0], before[1], fresh[2], before[3]])
    assert session.version == 1


@pytest.mark.parametrize("optimizer", ["Adagrad", "Adadelta", "Adamax", "ASGD"])
def test_state_put_in_continues_as_torch_does(optimizer: str) -> None:
    """Parameters and state of torch's optimizer, put into a session in the middle of a training, give torch's bits."""
    session = new_session(optimizer=optimizer, names=("w", "b"))
    twin = Twin(values(session, 0), optimizer, lr=0.1)
    for step in range(3):
        twin.step(values(session, 20 + step))
    states = [twin.optimizer.state[p] for p in twin.parameters]
    writer = Writer.join(session)
    rule = session.plan.rule
    contents: dict[str, list[torch.Tensor] | list[float]] = {"param": twin.parameters}
    for field in rule.tensor_fields:
        contents[field] = [state[field] for state in states]
    for field in rule.segment_fields:
        contents[field] = [float(state[field]) for state in states]
    writer.put(contents, initial=True, version=3)
    for step in range(3):
        gradients = values(session, 30 + step)
        writer.push(gradients)
        assert equal(parameters(session), twin.step(gradients))
    copied, _ = session.copy([*rule.tensor_fields, *rule.segment_fields])
    for field in rule.segment_fields:
        assert copied.numbers[field].tolist() == [float(twin.optimizer.state[p][field]) for p in twin.parameters]


@pytest.mark.parametrize(
    ("contents", "refusal"),
    [
        ({"step": [-1.0, 1.0]}, TensorMismatch),
        ({"step": [1.5, 1.0]}, TensorMismatch),
        ({"step": [float("nan"), 1.0]}, TensorMismatch),
        ({"momentum": [1.0, 1.0]}, InvalidOption),
        ({"present": [4.0, 0.0]}, TensorMismatch),
        ({"present": [-1.0, 0.0]}, TensorMismatch),
        ({"present": [0.5, 0.0]}, TensorMismatch),
        ({"present": [float("nan"), 0.0]}, TensorMismatch),
    ],
)
def test_contents_that_cannot_be_leave_no_trace(contents: dict[str, list[float]], refusal: type[FarstepError]) -> None:
    """A refused put changes neither version nor parameters nor state, and its sequence is free."""
    session = new_session(names=("w", "b"))
    (writer,) = begun(session)
    writer.push(values(session, 1))
    before, name = parameters(session), writer.named()
    with pytest.raises(refusal):
        writer.put({"param": values(session, 3), **contents})
    assert equal(parameters(session), before)
    assert session.version == 1
    assert receipt(writer.push(values(session, 2)), name).version == 2


def test_first_contents_that_cannot_be_leave_no_trace() -> None:
    """First contents with an impossible state are refused whole: the session is still to be begun."""
    session = new_session(names=("w", "b"))
    writer = Writer.join(session)
    with pytest.raises(TensorMismatch):
        writer.put({"param": values(session, 0), "step": [-1.0, 1.0]}, initial=True)
    assert not session.initialised
    name = writer.named()
    assert receipt(writer.put({"param": values(session, 1)}, initial=True), name).applied
    assert equal(parameters(session), values(session, 1))


def test_first_contents_hold_every_parameter() -> None:
    """First contents without parameters, or of some segments only, are refused before memory is taken."""
    session = new_session(names=("w", "b"))
    writer = Writer.join(session)
    with pytest.raises(TensorMismatch):
        writer.put({"step": [1.0, 1.0]}, initial=True)
    with pytest.raises(TensorMismatch):
        writer.put({"param": values(session, 1)[:1]}, segments=[0, 1], initial=True)
    assert not session.initialised


def test_later_contents_need_first_ones() -> None:
    """A put into a session without parameters is refused; its sequence stays free."""
    session = new_session()
    writer = Writer.join(session)
    with pytest.raises(NotInitialised):
        writer.put({"param": values(session, 1)})
    begun(session)


def test_a_put_while_others_wait_at_a_barrier_is_a_version_of_its_own() -> None:
    """Contents do not wait for a barrier, and the step that follows is taken from them."""
    session = new_session(consistency=sync(2))
    w0, w1 = begun(session, "w0", "w1")
    mine, theirs, fresh = values(session, 1), values(session, 2), values(session, 3)
    w0.push(mine)
    name = w1.named()
    assert receipt(w1.put({"param": fresh}), name).version == 1
    assert receipt(w1.push(theirs), w1.named(2)).version == 2
    assert equal(parameters(session), Twin(fresh).step([(a + b) / 2 for a, b in zip(mine, theirs, strict=True)]))


def test_a_put_under_the_name_of_a_push_that_waits_is_a_mismatch() -> None:
    """While a push waits its name is taken: contents sent under it are refused, and the push goes on waiting."""
    session = new_session(consistency=sync(2))
    w0, w1 = begun(session, "w0", "w1")
    before, name = parameters(session), w0.named()
    w0.push(values(session, 1))
    with pytest.raises(IdempotencyMismatch):
        w0.put({"param": values(session, 3)}, sequence=name.sequence)
    assert equal(parameters(session), before)
    assert receipt(w1.push(values(session, 2)), name).version == 1


def test_group_options_change_at_once_or_not_at_all() -> None:
    """Changed groups are in force from the next step on; one that is wrong leaves all of them as they were."""
    session = new_session(groups=({"lr": 0.1}, {"lr": 0.2}))
    (writer,) = begun(session)
    with pytest.raises(InvalidOption):
        session.set_groups({0: {"lr": 0.7}, 1: {"lr": "much"}})
    assert [group.to_options()["lr"] for group in session.groups] == [0.1, 0.2]
    session.set_groups({0: {"lr": 0.7}})
    start, gradients = parameters(session), values(session, 1)
    writer.push(gradients)
    assert equal(parameters(session), Twin(start, lr=0.7).step(gradients))


def test_what_is_held_stays_as_it_is() -> None:
    """A version that somebody holds does not change under later steps and puts."""
    session = new_session(names=("w", "b"))
    (writer,) = begun(session)
    before = parameters(session)
    held, _ = session.hold()
    writer.push(values(session, 1))
    writer.put({"param": values(session, 2)})
    writer.push(values(session, 3))
    assert held.version == 0
    assert equal([held.segment(0), held.segment(1)], before)
    assert held.changed_since(0) == []
    held.release()
    again, _ = session.hold()
    assert again.changed_since(0) == [0, 1]


def test_optional_state_that_nobody_has_is_left_out() -> None:
    """A copy of all fields has an optional one only when a segment has it, and says which segment that is."""
    session = new_session(optimizer="SGD", names=("w", "b"), groups=({"lr": 0.1}, {"lr": 0.1}), group_of={"b": 1})
    (writer,) = begun(session)
    writer.push(values(session, 1))
    asked = ["momentum_buffer", "present"]
    copied, _ = session.copy(asked)
    assert (copied.fields, copied.numbers["present"].tolist()) == (("present",), [0.0, 0.0])
    session.set_groups({1: {"momentum": 0.9}})
    writer.push(values(session, 2))
    copied, _ = session.copy(asked)
    assert (list(copied.fields), copied.numbers["present"].tolist()) == (asked, [0.0, 1.0])
