"""A step that one worker skips: nobody takes it, everybody learns so, and each is told exactly once."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from farstep.errors import IdempotencyMismatch, InvalidRequest
from farstep.protocol.messages import PushHead, WriteName
from tests.session.writers import Twin, begun, equal, new_session, parameters, receipt, sync, values

NAMES = ("w0", "w1")


@pytest.mark.parametrize("order", list(permutations(range(2))))
def test_a_skip_answers_all_and_changes_nothing(order: tuple[int, int]) -> None:
    """Whoever comes last, both get a receipt that says so, at the version before, and the next step is taken."""
    session = new_session(consistency=sync(2))
    writers = begun(session, *NAMES)
    twin = Twin(parameters(session))
    names = [writer.named() for writer in writers]
    outcomes: dict[Any, Any] = {}
    for index in order:
        writer = writers[index]
        outcomes = writer.skip() if index == 0 else writer.push(values(session, 1))
    assert outcomes.keys() == set(names)
    for name in names:
        given = receipt(outcomes, name)
        assert (given.version, given.applied, given.contributors, given.divisor) == (0, False, (), 2)
        assert given.reason == "skipped"
    assert session.deadline is None
    assert equal(parameters(session), twin.parameters)
    for writer in writers:
        writer.last = session.position(writer.name)[1]
        outcomes = writer.push(values(session, 2))
    assert len(outcomes) == 2
    assert equal(parameters(session), twin.step(values(session, 2)))


def test_a_skip_that_is_repeated_gets_the_first_receipt() -> None:
    """While it waits a retry joins it, later it gets the receipt, and other content under its name is refused."""
    session = new_session(consistency=sync(2))
    first, second = begun(session, *NAMES)
    name = first.named()
    assert first.skip() == {}
    assert first.skip() == {}
    second.push(values(session, 1))
    again = first.skip(sequence=name.sequence, base=0)
    assert again[name].duplicate
    assert not receipt(again, name).applied
    with pytest.raises(IdempotencyMismatch):
        first.push(values(session, 1), sequence=name.sequence)


def test_options_that_came_with_a_skipped_step_hold() -> None:
    """A worker that was answered believes the session to have its options, so the session has them."""
    session = new_session(consistency=sync(2))
    first, second = begun(session, *NAMES)
    first.skip(groups={0: {"lr": 0.5}})
    second.push(values(session, 1), groups={0: {"eps": 1e-3}})
    assert session.groups[0].to_options() | {"lr": 0.5, "eps": 1e-3} == session.groups[0].to_options()


def test_the_staleness_of_a_skipped_step() -> None:
    """It counts the steps between the gradient's version and the one that the step would have been applied to."""
    session = new_session()
    (writer,) = begun(session)
    writer.push(values(session, 1))
    name = writer.named()
    given = receipt(writer.skip(base=0), name)
    assert (given.version, given.base, given.staleness) == (1, 0, 1)


@pytest.mark.parametrize("segments", [None, [0, 1]])
def test_a_skip_with_gradients_is_refused(segments: list[int] | None) -> None:
    """A push either skips the step or has gradients."""
    head = PushHead(WriteName("w0", 1, 1), "here", 0, segments=segments, skip=True)
    with pytest.raises(InvalidRequest, match="no gradients"):
        PushHead.from_header(head.to_header())
