"""Rounds that are accumulated: their mean makes a step, each counts once, and one left out changes no other."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from farstep.errors import InvalidOption, NonFinite
from tests.session.failing import FailingKernels
from tests.session.writers import (
    Gradient,
    Twin,
    begun,
    equal,
    error,
    mean_of,
    new_session,
    parameters,
    receipt,
    sync,
    values,
)
from tests.support.durability.files import restored, written

NAMES = ("w0", "w1")


def test_the_last_of_k_pushes_makes_the_step_of_their_mean() -> None:
    """Replies before it say that they are accumulated and leave the version; its own has all contributors."""
    session = new_session(accumulate=3)
    w0, w1 = begun(session, *NAMES)
    twin = Twin(parameters(session))
    for step in range(3):
        given = [values(session, 10 * step + number) for number in range(3)]
        for number, writer in enumerate((w0, w1)):
            name = writer.named()
            told = receipt(writer.push(given[number]), name)
            assert (told.version, told.applied, told.reason) == (step, False, "accumulated")
            assert told.detail == f"Round {number + 1} of 3."
            assert equal(parameters(session), twin.parameters)
        name = w0.named()
        told = receipt(w0.push(given[2]), name)
        assert (told.version, told.applied, told.reason) == (step + 1, True, "")
        assert told.contributors == ("w0", "w1", "w0")
        assert equal(parameters(session), twin.step(mean_of(*given)))


def test_barriers_are_rounds() -> None:
    """In a sync session each barrier is one: what is accumulated is its mean, and all of its workers are told alike."""
    session = new_session(consistency=sync(2), accumulate=2)
    writers = begun(session, *NAMES)
    twin = Twin(parameters(session))
    rounds = []
    for number in range(2):
        given = [values(session, 10 * number + index) for index in range(2)]
        names = [writer.named() for writer in writers]
        writers[0].push(given[0])
        outcomes = writers[1].push(given[1])
        writers[0].last += 1
        assert [receipt(outcomes, name).applied for name in names] == [bool(number)] * 2
        rounds.append(mean_of(*given))
    assert equal(parameters(session), twin.step(mean_of(*rounds)))


@given(st.lists(st.lists(st.sampled_from(["dense", "none", "sparse"]), min_size=4, max_size=4), min_size=2, max_size=5))
def test_gradients_may_be_missing_or_sparse_in_any_round(kinds: list[list[str]]) -> None:
    """A parameter that no round has a gradient of is not stepped; where only some do, the others count as zeros."""
    session = new_session(accumulate=len(kinds), names=("w", "b", "scale", "z"))
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    rounds: list[list[Gradient]] = []
    for number, row in enumerate(kinds):
        drawn: list[Gradient] = list(values(session, number))
        sent: list[Gradient] = list(drawn)
        for index, kind in enumerate(row):
            own = drawn[index]
            if kind == "none" or own is None:
                drawn[index] = sent[index] = None
            elif kind == "sparse" and index < 2:
                rows = torch.tensor([[0, 2, 0]])
                sent[index] = torch.sparse_coo_tensor(rows, own[[0, 1, 2]], own.shape, check_invariants=True)
                drawn[index] = sent[index].to_dense()  # type: ignore[union-attr]
        rounds.append(drawn)
        writer.push(sent)
    assert session.version == 1
    torch.testing.assert_close(parameters(session), twin.step(mean_of(*rounds)))


def test_a_round_that_is_repeated_counts_once() -> None:
    """A retry of an accumulated push gets its first receipt, before the step and after it."""
    session = new_session(accumulate=2)
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    name = writer.named()
    first = receipt(writer.push(values(session, 1)), name)
    again = writer.push(values(session, 1), sequence=name.sequence)[name]
    assert again.duplicate
    assert again.result == first
    writer.push(values(session, 2))
    assert equal(parameters(session), twin.step(mean_of(values(session, 1), values(session, 2))))
    assert writer.push(values(session, 1), sequence=name.sequence, base=0)[name].result == first
    assert session.version == 1


def test_a_round_that_somebody_skips_is_no_round() -> None:
    """What was accumulated waits on, and as many rounds as before are missing."""
    session = new_session(consistency=sync(2), accumulate=2)
    writers = begun(session, *NAMES)
    twin = Twin(parameters(session))
    taken: list[Sequence[Gradient]] = []
    for number, skips in enumerate([False, True, False]):
        given = [values(session, 10 * number + index) for index in range(2)]
        writers[0].push(given[0])
        name = writers[1].named()
        outcomes = writers[1].skip() if skips else writers[1].push(given[1])
        writers[0].last += 1
        assert receipt(outcomes, name).reason == ("skipped" if skips else "" if taken else "accumulated")
        if not skips:
            taken.append(mean_of(*given))
    assert equal(parameters(session), twin.step(mean_of(*taken)))


def test_rounds_of_a_worker_that_left_still_count() -> None:
    """It was told that its gradients are accumulated, and they are."""
    session = new_session(accumulate=2)
    w0, w1 = begun(session, *NAMES)
    twin = Twin(parameters(session))
    w0.push(values(session, 1))
    session.leave("w0", w0.epoch, 0.0)
    name = w1.named()
    assert receipt(w1.push(values(session, 2)), name).contributors == NAMES
    assert equal(parameters(session), twin.step(mean_of(values(session, 1), values(session, 2))))


def test_options_of_every_round_hold() -> None:
    """A learning rate that came with an accumulated push is in force when the step is taken."""
    session = new_session(accumulate=2)
    (writer,) = begun(session)
    twin = Twin(parameters(session), lr=0.5)
    writer.push(values(session, 1), groups={0: {"lr": 0.5}})
    writer.push(values(session, 2))
    assert equal(parameters(session), twin.step(mean_of(values(session, 1), values(session, 2))))


def test_a_session_may_grow_between_rounds() -> None:
    """The round before did not know the new parameters, whose gradients count as zero in it."""
    session = new_session(accumulate=2)
    (writer,) = begun(session)
    writer.push(values(session, 1))
    before = parameters(session)
    late = torch.arange(6.0).view(2, 3)
    writer.append({"late": late})
    twin = Twin([*before, late.clone()])
    twin.optimizer.param_groups[0]["params"].pop()
    twin.optimizer.add_param_group({"params": [twin.parameters[-1]], "lr": 0.3})
    writer.push(values(session, 2))
    rounds: list[Sequence[Gradient]] = [[*values(session, 1)[:-1], None], values(session, 2)]
    assert equal(parameters(session), twin.step(mean_of(*rounds)))


@pytest.mark.parametrize("field", ["param", "sum"])
def test_what_is_written_between_rounds_leaves_what_was_accumulated(field: str) -> None:
    """The step is taken from the parameters and the state that are there then, along the mean of all rounds."""
    session = new_session(accumulate=2)
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    fresh = [each.abs() for each in values(session, 7)[:3]]
    writer.push(values(session, 1))
    writer.put({field: fresh}, segments=[0, 3])
    for parameter, written_one in zip(twin.parameters, fresh, strict=False):
        (parameter if field == "param" else twin.optimizer.state[parameter]["sum"]).copy_(written_one)
    writer.push(values(session, 2))
    assert equal(parameters(session), twin.step(mean_of(values(session, 1), values(session, 2))))


def test_a_last_round_that_is_refused_leaves_the_others() -> None:
    """It failed, so its sequence is free; another push in its place completes the same step."""
    session = new_session(accumulate=2)
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    writer.push(values(session, 1))
    with pytest.raises(InvalidOption):
        writer.push(values(session, 2), groups={0: {"lr": "much"}})
    with pytest.raises(NonFinite):
        writer.push([gradient * float("nan") for gradient in values(session, 2)])
    writer.push(values(session, 3))
    assert equal(parameters(session), twin.step(mean_of(values(session, 1), values(session, 3))))


@pytest.mark.parametrize("block", range(6))
def test_a_kernel_that_fails_in_the_middle_takes_the_rounds_with_it(block: int) -> None:
    """Its step is finished for the retry, with all contributors and the norm, and the next one begins with no round."""
    kernels = FailingKernels()
    session = new_session(names=("w", "b", "scale"), kernels=kernels, accumulate=2, clip_norm=1e3)
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    writer.push(values(session, 1))
    kernels.fault.at, name = block, writer.named()
    error(writer.push(values(session, 2))[name])
    kernels.fault.at = None
    told = receipt(writer.push(values(session, 2)), name)
    assert (told.version, told.contributors) == (1, ("w0", "w0"))
    assert told.grad_norm is not None
    assert equal(parameters(session), twin.step(mean_of(values(session, 1), values(session, 2))))
    name = writer.named()
    assert receipt(writer.push(values(session, 3)), name).detail == "Round 1 of 2."


def test_rounds_that_wait_are_counted_as_memory_and_not_exported() -> None:
    """Like a push at a barrier they are on their way: a file has the version before them, and none of them."""
    session = new_session(accumulate=2, names=("w", "b"))
    (writer,) = begun(session)
    before = written(session)
    assert session.nbytes()["waiting"] == 0
    writer.push(values(session, 1))
    assert session.nbytes()["waiting"] == session.plan.layout.nbytes
    assert written(session) == before
    again = restored(written(session))
    assert again.plan.policies.rounds == 2
    assert again.nbytes()["waiting"] == 0


def test_clipping_is_of_the_mean() -> None:
    """Rounds are not clipped by themselves: of two opposite ones nothing is left to be clipped."""
    session = new_session(accumulate=2, clip_norm=1e-3)
    (writer,) = begun(session)
    before = parameters(session)
    writer.push(values(session, 1))
    name = writer.named()
    opposite: list[Tensor] = [-gradient for gradient in values(session, 1)]
    assert receipt(writer.push(opposite), name).grad_norm == 0.0
    assert equal(parameters(session), before)
