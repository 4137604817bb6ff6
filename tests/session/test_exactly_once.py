"""Every row of the exactly-once table, on the session itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from farstep.errors import (
    FarstepError,
    Fenced,
    IdempotencyMismatch,
    InvalidOption,
    InvalidRequest,
    NonFinite,
    NotInitialised,
    ReceiptExpired,
    SequenceGap,
    SessionLost,
    TensorMismatch,
)
from farstep.protocol import Names
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator.roster import RECEIPTS_KEPT
from farstep_service.session import Outcome
from tests.session.writers import Twin, Writer, begun, equal, error, new_session, parameters, receipt, sync, values


def test_the_next_in_sequence_is_applied() -> None:
    """A push with the next sequence makes the next version, and its receipt says what was done."""
    session = new_session()
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    for step in range(3):
        gradients = values(session, 10 + step)
        name = writer.named()
        assert receipt(writer.push(gradients), name) == Receipt(
            version=step + 1, base=step, contributors=Names(("w0",)), divisor=1, kernel="reference"
        )
        assert equal(parameters(session), twin.step(gradients))
    assert session.position("w0") == (1, 4, False)


def test_a_write_seen_before_gets_the_original_receipt() -> None:
    """Repeated at once or after later writes, a push gets what it got the first time, and changes nothing."""
    session = new_session()
    (writer,) = begun(session)
    first, second = values(session, 1), values(session, 2)
    name = writer.named()
    original = receipt(writer.push(first, base=0), name)
    assert writer.push(first, base=0, sequence=name.sequence)[name] == Outcome(original, duplicate=True)
    writer.push(second)
    before = parameters(session)
    assert writer.push(first, base=0, sequence=name.sequence)[name] == Outcome(original, duplicate=True)
    assert equal(parameters(session), before)
    assert session.version == 2


def test_a_write_older_than_the_receipts_kept_is_refused() -> None:
    """A push whose receipt has been forgotten is not applied again either, and no receipt is invented for it."""
    session = new_session(names=("b",))
    (writer,) = begun(session)
    first = writer.named()
    gradients = values(session, 1)
    for _ in range(RECEIPTS_KEPT + 1):
        writer.push(gradients)
    version, last = session.version, writer.last
    with pytest.raises(ReceiptExpired) as refused:
        writer.push(gradients, sequence=first.sequence)
    assert refused.value.extra["last"] == last
    assert (session.version, session.position(writer.name)[1]) == (version, last)
    assert receipt(writer.push(gradients), writer.named(last + 1)).version == version + 1


def test_another_content_under_a_name_that_is_taken_is_refused() -> None:
    """Other gradients, other segments or other options under the name of a committed push are a mismatch."""
    session = new_session()
    (writer,) = begun(session)
    name = writer.named()
    gradients = values(session, 1)
    writer.push(gradients)
    for others, groups in ((values(session, 2), None), ([*gradients[:-1], None], None), (gradients, {0: {"lr": 1.0}})):
        with pytest.raises(IdempotencyMismatch):
            writer.push(others, sequence=name.sequence, groups=groups)
    assert session.version == 1
    assert session.groups[0].to_options()["lr"] == 0.1


@pytest.mark.parametrize("ahead", [1, 2, 2**40])
def test_a_gap_names_the_sequence_that_is_expected(ahead: int) -> None:
    """A push that skips a sequence is refused, and the missing one still works."""
    session = new_session()
    (writer,) = begun(session)
    with pytest.raises(SequenceGap) as raised:
        writer.push(values(session, 1), sequence=writer.last + 1 + ahead)
    assert raised.value.extra["expected"] == writer.last + 1
    assert session.version == 0
    writer.push(values(session, 1))
    assert session.version == 1


def test_one_that_still_waits_is_joined() -> None:
    """A retry of a push that waits at a barrier waits with it: one outcome under one name, applied once."""
    session = new_session(consistency=sync(2))
    w0, w1 = begun(session, "w0", "w1")
    start, mine, theirs = parameters(session), values(session, 1), values(session, 2)
    name = w0.named()
    assert w0.push(mine) == {}
    assert session.position("w0") == (1, 1, True)
    assert w0.push(mine) == {}
    assert w0.push(mine, now=1.0) == {}
    outcomes = w1.push(theirs)
    assert outcomes.keys() == {name, w1.named(w1.last)}
    assert session.version == 1
    assert equal(parameters(session), Twin(start).step([(a + b) / 2 for a, b in zip(mine, theirs, strict=True)]))


def test_another_content_than_the_one_that_waits_is_refused() -> None:
    """While a push waits, its name with other gradients is a mismatch, and the first one goes on waiting."""
    session = new_session(consistency=sync(2))
    w0, w1 = begun(session, "w0", "w1")
    name = w0.named()
    w0.push(values(session, 1))
    with pytest.raises(IdempotencyMismatch):
        w0.push(values(session, 3))
    assert receipt(w1.push(values(session, 2)), name).version == 1


def test_an_older_epoch_is_fenced() -> None:
    """After a worker joined again, what its former life sends is refused, duplicates included."""
    session = new_session()
    (old,) = begun(session)
    gradients = values(session, 1)
    old.push(gradients)
    new = Writer.join(session)
    assert new.epoch == old.epoch + 1
    for sequence in (1, 2, 3):
        with pytest.raises(Fenced):
            old.push(gradients, sequence=sequence)
    assert session.version == 1
    assert receipt(new.push(gradients), new.named(1)).version == 2


@pytest.mark.parametrize("epoch", [0, 2, 2**62])
def test_an_epoch_that_nobody_opened_is_fenced(epoch: int) -> None:
    """A push of a worker that never joined, or of an epoch still to come, is refused."""
    session = new_session()
    begun(session)
    for name in ("w0", "stranger"):
        with pytest.raises(Fenced):
            Writer(session, name, epoch).push(values(session, 1))
    assert session.version == 0


def test_another_life_of_the_session_is_lost() -> None:
    """A push for another incarnation is told that its session is gone."""
    session = new_session()
    (writer,) = begun(session)
    with pytest.raises(SessionLost):
        writer.push(values(session, 1), incarnation="there")
    assert session.version == 0


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("wrong", "refusal"),
    [
        ({"base": 5}, TensorMismatch),
        ({"groups": {7: {"lr": 1.0}}}, InvalidOption),
        ({"groups": {0: {"momentum": 1.0}}}, InvalidOption),
        ({"groups": {0: {"lr": "fast"}}}, InvalidOption),
        ({"groups": {0: {"lr": float("nan")}}}, InvalidOption),
        ({"nan": 0}, NonFinite),
        ({"nan": 3}, NonFinite),
        ({"index": 3}, TensorMismatch),
        ({"index": -1}, TensorMismatch),
    ],
)
def test_a_push_that_is_refused_leaves_its_sequence_free(
    wrong: Mapping[str, Any], refusal: type[FarstepError], waits: bool
) -> None:
    """Whatever validation refuses changes nothing, for nobody; the same sequence with a good push then works."""
    session = new_session(consistency=sync(2)) if waits else new_session()
    writers = begun(session, "w0", "w1")
    if waits:
        writers[1].push(values(session, 2))
    start, bad = parameters(session), list(values(session, 1))
    options = dict(wrong)
    if (nan := options.pop("nan", None)) is not None:
        bad[nan].reshape(-1)[-1] = float("nan")
    if (index := options.pop("index", None)) is not None:
        bad[0] = torch.sparse_coo_tensor(torch.tensor([[index]]), torch.ones(1, 4), (3, 4), check_invariants=False)
    with pytest.raises(refusal):
        writers[0].push(bad, **options)
    assert session.version == 0
    assert equal(parameters(session), start)
    assert session.position("w0") == (1, 1, False)
    assert session.groups[0].to_options()["lr"] == 0.1
    name = writers[0].named()
    assert receipt(writers[0].push(values(session, 1)), name).version == 1


def test_a_push_before_the_first_parameters_is_refused() -> None:
    """A session without parameters refuses gradients; its sequence stays free for the parameters."""
    session = new_session()
    writer = Writer.join(session)
    with pytest.raises(NotInitialised):
        writer.push(values(session, 1))
    name = writer.named()
    assert receipt(writer.put({"param": values(session, 0)}, initial=True), name).version == 0


def test_a_refused_push_names_tensor_and_worker() -> None:
    """A gradient that is not finite is refused with the names of the first such tensor and of the worker."""
    session = new_session()
    (writer,) = begun(session, "alice")
    gradients = values(session, 1)
    gradients[1][2] = float("inf")
    gradients[3][0] = torch.tensor(complex(0, float("-inf")))
    with pytest.raises(NonFinite, match=r"'b'.*'alice'") as raised:
        writer.push(gradients)
    assert raised.value.field == "b"


def test_gradients_that_are_not_finite_are_taken_where_the_session_allows_them() -> None:
    """With nonfinite='allow' the step is applied as torch would."""
    session = new_session(nonfinite="allow")
    (writer,) = begun(session)
    gradients = values(session, 1)
    gradients[0][0, 0] = float("inf")
    twin = Twin(parameters(session))
    writer.push(gradients)
    expected = twin.step(gradients)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(parameters(session), expected, strict=True))
    assert session.version == 1


def test_large_gradients_whose_sum_overflows_are_finite() -> None:
    """A gradient whose elements are finite is accepted even if their sum is not."""
    session = new_session(names=("w", "b"))
    (writer,) = begun(session)
    gradients = values(session, 1)
    gradients[0].fill_(3e38)
    writer.push(gradients)
    assert session.version == 1


def test_staleness_counts_the_steps_in_between() -> None:
    """In async mode a push computed on an older version is applied, and says how old it was."""
    session = new_session()
    w0, w1 = begun(session, "w0", "w1")
    for _ in range(3):
        w0.push(values(session, 1))
    name = w1.named()
    given = receipt(w1.push(values(session, 2), base=1), name)
    assert (given.version, given.base, given.staleness) == (4, 1, 2)


@pytest.mark.parametrize(
    "ranges", [[0], [1, 1], [2, 1], [0, 2, 1, 3], [0, 9], [-1, 2], [0, True], ["0", 1], [[0, 1]], [0.0, 1]]
)
def test_segments_that_are_no_ranges_are_refused(ranges: list[Any]) -> None:
    """Ranges must ascend, hold something, lie inside the session and be made of ints."""
    from farstep.protocol.messages import PushHead

    session = new_session()
    (writer,) = begun(session)
    with pytest.raises(InvalidRequest):
        session.contribution(PushHead(writer.named(), "here", 0, segments=ranges))


def test_a_push_without_gradients_is_a_step_of_nothing() -> None:
    """As torch steps when every gradient is None: nothing changes but the version."""
    session = new_session()
    (writer,) = begun(session)
    before, name = parameters(session), writer.named()
    assert receipt(writer.push([None] * 4), name).version == 1
    assert equal(parameters(session), before)


def test_changed_options_travel_with_the_push() -> None:
    """Options in a push are in force from its own step on, and stay."""
    session = new_session(group_of={"b": 1}, groups=({"lr": 0.1}, {"lr": 0.2}))
    (writer,) = begun(session)
    start = parameters(session)
    params = [each.clone() for each in start]
    optimizer = torch.optim.Adagrad(
        [{"params": [params[0], params[2], params[3]], "lr": 0.5}, {"params": [params[1]], "lr": 0.2}], foreach=False
    )
    for step in range(2):
        gradients = values(session, step)
        writer.push(gradients, groups={0: {"lr": 0.5}} if step == 0 else None)
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert equal(parameters(session), params)
    assert [group.to_options()["lr"] for group in session.groups] == [0.5, 0.2]


def test_an_option_with_which_no_step_exists_changes_nothing() -> None:
    """A push whose options make the step impossible (a division by zero) is refused, and its options are forgotten."""
    session = new_session()
    (writer,) = begun(session)
    writer.push(values(session, 1))
    name = writer.named()
    outcome = writer.push(values(session, 2), groups={0: {"lr_decay": -1.0}})[name]
    assert isinstance(error(outcome), InvalidOption)
    assert session.groups[0].to_options()["lr_decay"] == 0.0
    assert receipt(writer.push(values(session, 2)), name).version == 2


@pytest.mark.parametrize(
    ("optimizer", "option"),
    [
        *[("Adagrad", each) for each in ("lr", "weight_decay", "eps")],
        *[("Adadelta", each) for each in ("lr", "rho", "weight_decay", "eps")],
        *[("Adamax", each) for each in ("lr", "weight_decay", "eps")],
        ("ASGD", "weight_decay"),
    ],
)
def test_an_option_that_no_operation_takes_is_refused(optimizer: str, option: str) -> None:
    """A number that torch's operations refuse, such as one beyond the dtype, is refused here; the session goes on."""
    for name in ("b", "scale"):
        for value in (1e39, -1e300, 10**30):
            session = new_session(optimizer=optimizer, names=(name,))
            (writer,) = begun(session)
            writer.push(values(session, 1))
            before, push = parameters(session), writer.named()
            result = writer.push(values(session, 2), groups={0: {option: value}})[push].result
            if isinstance(result, Receipt):
                continue
            assert isinstance(result, InvalidOption), (name, value)
            assert equal(parameters(session), before)
            assert receipt(writer.push(values(session, 2), groups={0: {option: 0.5}}), push).version == 2
