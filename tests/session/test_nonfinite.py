"""NaN and Inf in a session that skips such steps: nobody takes them, and everybody learns whose they were."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch

from farstep.errors import NonFinite
from tests.session.writers import Twin, begun, equal, error, new_session, parameters, receipt, sync, values

NAMES = ("w0", "w1")
LARGEST = torch.finfo(torch.float32).max


def state_of(session: Any) -> bytes:
    contents, _ = session.copy(("param", *session.plan.rule.kinds, "present"))
    return b"".join(contents.memory())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("order", list(permutations(range(2))))
def test_one_workers_nan_skips_the_step_of_all(order: tuple[int, int], bad: float) -> None:
    """All get one outcome that names worker and tensor; parameters, state and step counts are as before."""
    session = new_session(consistency=sync(2), nonfinite="skip")
    writers = begun(session, *NAMES)
    for writer in writers:
        outcomes = writer.push(values(session, 1))
    writers[0].last += 1
    before = state_of(session)
    names = [writer.named() for writer in writers]
    for index in order:
        gradients = values(session, 2 + index)
        if index == 1:
            gradients[1][3] = bad
        outcomes = writers[index].push(gradients)
    assert outcomes.keys() == set(names)
    for name in names:
        told = receipt(outcomes, name)
        assert (told.version, told.applied, told.reason) == (1, False, "nonfinite")
        assert told.detail == "The gradient of 'b' from worker 'w1' holds NaN or Inf."
    assert state_of(session) == before
    assert session.deadline is None


def test_a_sum_that_overflows_skips_the_step_though_each_gradient_is_finite() -> None:
    """It is decided once, for the reduced gradients, and the tensor is named; nobody is to blame."""
    session = new_session(consistency=sync(2), nonfinite="skip")
    first, second = begun(session, *NAMES)
    before = state_of(session)
    gradients = values(session, 1)
    gradients[1][2] = LARGEST
    first.push(gradients)
    outcomes = second.push(gradients)
    assert len(outcomes) == 2
    for outcome in outcomes.values():
        told: Any = outcome.result
        assert (told.applied, told.reason, told.contributors) == (False, "nonfinite", NAMES)
        assert told.detail == "The sum of the gradients of 'b' holds NaN or Inf, though each of them is finite."
    assert state_of(session) == before
    first.last += 1
    twin = Twin(parameters(session))
    for writer in (first, second):
        writer.push(values(session, 3))
    assert equal(parameters(session), twin.step(values(session, 3)))


@pytest.mark.parametrize("policy", [{}, {"clip_norm": 1.0}, {"clip_norm": 1.0, "clip_norm_type": "inf"}])
def test_a_sum_that_overflows_is_refused_where_nan_is(policy: dict[str, Any]) -> None:
    """Every worker gets the error, nothing has changed, and its sequence is free; clipping changes nothing about it."""
    session = new_session(consistency=sync(2), **policy)
    first, second = begun(session, *NAMES)
    before = state_of(session)
    gradients = values(session, 1)
    gradients[3][0] = torch.tensor(complex(0, LARGEST))
    first.push(gradients)
    outcomes = second.push(gradients)
    assert len(outcomes) == 2
    for outcome in outcomes.values():
        assert isinstance(error(outcome), NonFinite)
        assert error(outcome).field == "z"
    assert state_of(session) == before
    assert [session.position(name)[1] for name in NAMES] == [1, 0]


def test_a_session_that_allows_them_takes_such_sums() -> None:
    """As torch does: the parameter is what Inf makes of it."""
    session = new_session(consistency=sync(2), nonfinite="allow", optimizer="SGD")
    first, second = begun(session, *NAMES)
    gradients = values(session, 1)
    gradients[1][2] = LARGEST
    first.push(gradients)
    second.push(gradients)
    assert session.version == 1
    assert parameters(session)[1][2] == float("-inf")


def test_a_norm_that_overflows_by_itself_is_no_overflow_of_the_gradients() -> None:
    """Gradients whose squares have no room are finite: the step is taken, clipped to nothing as torch does it."""
    session = new_session(names=("w", "b"), consistency=sync(2), nonfinite="skip", clip_norm=1.0, optimizer="SGD")
    first, second = begun(session, *NAMES)
    before = parameters(session)
    huge = [torch.full((3, 4), 1e38), torch.zeros(5)]
    name = first.named()
    first.push(huge)
    told = receipt(second.push(huge), name)
    assert (told.applied, told.grad_norm) == (True, float("inf"))
    assert equal(parameters(session), before)


def test_the_sum_of_accumulated_rounds_is_looked_at_too() -> None:
    """If it overflows, all its rounds are given up, and the next step begins anew."""
    session = new_session(nonfinite="skip", accumulate=2)
    (writer,) = begun(session)
    before = state_of(session)
    huge = values(session, 1)
    huge[0][0, 0] = LARGEST
    writer.push(huge)
    name = writer.named()
    assert receipt(writer.push(huge), name).reason == "nonfinite"
    assert state_of(session) == before
    twin = Twin(parameters(session))
    writer.push(values(session, 2))
    writer.push(values(session, 2))
    assert equal(parameters(session), twin.step(values(session, 2)))


def test_a_round_with_nan_is_no_round() -> None:
    """It is left out by itself; what was accumulated before waits on."""
    session = new_session(nonfinite="skip", accumulate=2)
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    writer.push(values(session, 1))
    name = writer.named()
    told = receipt(writer.push([gradient * float("nan") for gradient in values(session, 2)]), name)
    assert (told.reason, told.detail) == ("nonfinite", "The gradient of 'w' from worker 'w0' holds NaN or Inf.")
    writer.push(values(session, 3))
    expected = [(one + other) / 2 for one, other in zip(values(session, 1), values(session, 3), strict=True)]
    assert equal(parameters(session), twin.step(expected))
