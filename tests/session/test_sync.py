"""Sync mode: one step for all workers, reduced in the order of their names, with one outcome for all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import permutations

import pytest
import torch

from farstep.errors import BarrierTimeout, Fenced, InvalidOption, SessionFull, TensorMismatch
from farstep.protocol.packing import pack_header
from tests.session.writers import (
    Gradient,
    Twin,
    Writer,
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

NAMES = ("w0", "w1", "w2")


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_step_has_the_same_bits_whatever_the_order_of_arrival(order: Sequence[int]) -> None:
    """Three steps of three workers equal torch on the mean in the order of names, bit for bit."""
    session = new_session(consistency=sync(3))
    writers = begun(session, *NAMES)
    twin = Twin(parameters(session))
    for step in range(3):
        gradients = [values(session, 100 * step + index) for index in range(3)]
        names = [writer.named() for writer in writers]
        outcomes = [writers[index].push(gradients[index], now=float(step)) for index in order]
        assert outcomes[:2] == [{}, {}]
        assert outcomes[2].keys() == set(names)
        for name in names:
            given = receipt(outcomes[2], name)
            assert (given.version, given.contributors, given.divisor) == (step + 1, NAMES, 3)
        for writer in writers:
            writer.last = session.position(writer.name)[1]
        assert equal(parameters(session), twin.step(mean_of(*gradients)))


HUGE = 1e8
"""Beside it a float32 loses what is of the size of 1, so that the order of a sum shows."""


@pytest.mark.parametrize("kind", ["dense", "some", "sparse", "options"])
def test_random_names_do_not_order_a_sum(kind: str) -> None:
    """Whatever names workers were given at random, the same gradients and options make the same bits."""
    results = []
    for names in permutations(("a-17", "m-3", "z-99")):
        session = new_session(consistency=sync(4), names=("w", "b"))
        begun(session, "m-named")
        writers = [Writer.join(session, name, named=False) for name in names]
        named = Writer(session, "m-named", 1, 1)
        named.push([torch.ones(3, 4), torch.ones(5)])
        for who, writer in enumerate(writers):
            dense = values(session, 10 + who)
            dense[0] *= (HUGE, -HUGE, 1.0)[who]
            given: list[Gradient] = list(dense)
            if kind == "some" and who:
                given[who - 1] = None
            elif kind == "sparse":
                given[0] = rows(who, 0, 1)
            elif kind == "options":
                given = list(values(session, 10))
            outcomes = writer.push(given, groups={0: {"lr": 0.1 * (who + 1)}} if kind == "options" else None)
        assert receipt(outcomes, writers[-1].named(1)).contributors[0] == "m-named"
        results.append(parameters(session))
    assert all(equal(each, results[0]) for each in results)


def test_a_step_packs_its_contributors_once() -> None:
    """Its answers, and one to a push that is repeated, carry the same bytes, which are made for the first of them."""
    session = new_session(consistency=sync(3))
    writers = begun(session, *NAMES)
    for step in range(2):
        names = [writer.named() for writer in writers]
        gradients = [values(session, index) for index in range(3)]
        outcomes = [writer.push(each, now=float(step)) for writer, each in zip(writers, gradients, strict=True)][-1]
        repeated = writers[0].push(gradients[0], sequence=names[0].sequence, now=float(step))
        receipts = [*(receipt(outcomes, name) for name in names), receipt(repeated, names[0])]
        first = receipts[0].contributors.packed
        for each in receipts:
            assert each.contributors.packed is first
            assert first in pack_header({"receipt": each.to_header()})
        for writer in writers:
            writer.last = session.position(writer.name)[1]


@pytest.mark.parametrize(
    "missing",
    [
        [[0], [], []],
        [[], [0], [0]],
        [[0, 1], [1, 2], [3]],
        [[0, 1, 2, 3], [], [1]],
        [[2], [2], [2]],
        [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]],
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_segment_that_some_lack_counts_as_zero_for_them(missing: list[list[int]], order: Sequence[int]) -> None:
    """The sum is over those who have a gradient, the divisor is N; what nobody has does not step."""
    session = new_session(consistency=sync(3))
    writers = begun(session, *NAMES)
    twin = Twin(parameters(session))
    for step in range(2):
        gradients = [
            [None if index in missing[who] else each for index, each in enumerate(values(session, 10 * step + who))]
            for who in range(3)
        ]
        for who in order:
            writers[who].push(gradients[who])
        for writer in writers:
            writer.last = session.position(writer.name)[1]
        assert equal(parameters(session), twin.step(mean_of(*gradients)))
    assert session.version == 2


def rows(seed: int, *indices: int) -> torch.Tensor:
    """Return a sparse gradient of rows of `w`, some of them perhaps twice."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(indices), 4, generator=generator)
    return torch.sparse_coo_tensor(torch.tensor([indices], dtype=torch.int64), values, (3, 4), check_invariants=True)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("kinds", ["sss", "dss", "sds", "ssd", "dds", "sdd", "s-s", "-s-", "d-s", "--d"])
def test_sparse_and_dense_gradients_mix(kinds: str, order: Sequence[int]) -> None:
    """Rows of some workers and whole gradients of others give one step, the same in every order of arrival."""
    session = new_session(consistency=sync(3), names=("w", "b"))
    writers = begun(session, *NAMES)
    start = parameters(session)
    sparse = [rows(1, 0, 2), rows(2, 2, 2, 1), rows(3)]
    gradients: list[list[Gradient]] = []
    for who, kind in enumerate(kinds):
        own: list[Gradient] = list(values(session, 40 + who))
        own[0] = {"s": sparse[who], "d": own[0], "-": None}[kind]
        gradients.append(own)
    for who in order:
        writers[who].push(gradients[who])
    assert session.version == 1
    after = parameters(session)
    expected = mean_of(*gradients)
    if "d" not in kinds:
        expected[0] = reduce(torch.add, [each[0] for each in gradients if each[0] is not None]) / 3
    twin = Twin(start).step(expected)
    assert torch.equal(after[1], twin[1])
    torch.testing.assert_close(after[0], twin[0], rtol=1e-6, atol=1e-7)
    if order != (0, 1, 2):
        again = new_session(consistency=sync(3), names=("w", "b"))
        others = begun(again, *NAMES)
        for who in range(3):
            others[who].push(gradients[who])
        assert equal(parameters(again), after)


def test_sparse_rows_are_applied_as_torch_does() -> None:
    """One worker's sparse gradients give torch's bits, duplicates of a row included."""
    session = new_session(names=("w", "b"))
    (writer,) = begun(session)
    twin = Twin(parameters(session))
    for step in range(4):
        gradients: list[Gradient] = [rows(step, 1, 1, 0), values(session, step)[1]]
        writer.push(gradients)
        assert equal(parameters(session), twin.step(gradients))


def test_complex_rows_are_applied_as_torch_does() -> None:
    """A sparse gradient of a complex parameter works wherever the parameter lies in memory."""
    session = new_session(names=("b", "z"))
    (writer,) = begun(session)
    gradient = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([1 + 2j], dtype=torch.complex64), (2,))
    twin = Twin(parameters(session))
    name = writer.named()
    assert receipt(writer.push([None, gradient]), name).version == 1
    torch.testing.assert_close(parameters(session), twin.step([None, gradient]))


@pytest.mark.parametrize("optimizer", ["Adadelta", "Adamax", "ASGD"])
def test_rows_are_refused_where_torch_refuses_them(optimizer: str) -> None:
    """An optimizer without sparse gradients says so, before memory is taken."""
    session = new_session(optimizer=optimizer, names=("w", "b"))
    (writer,) = begun(session)
    with pytest.raises(TensorMismatch, match="sparse"):
        writer.push([rows(1, 0), values(session, 1)[1]])


def test_rows_are_refused_with_weight_decay() -> None:
    """Adagrad takes no sparse gradients with weight decay, as torch says."""
    session = new_session(names=("w", "b"), groups=({"lr": 0.1, "weight_decay": 0.1},))
    (writer,) = begun(session)
    with pytest.raises((TensorMismatch, InvalidOption), match="weight_decay"):
        writer.push([rows(1, 0), values(session, 1)[1]])
    assert session.version == 0


def test_the_deadline_has_one_outcome_for_all() -> None:
    """When it passes, everyone who waits learns so and nothing is applied; the same pushes work when all are there."""
    session = new_session(consistency=sync(3, deadline_s=10.0))
    w0, w1, w2 = begun(session, *NAMES)
    start = parameters(session)
    w2.push(values(session, 2), now=100.0)
    w0.push(values(session, 0), now=109.0)
    assert session.deadline == 110.0
    assert session.tick(109.9) == {}
    outcomes = session.tick(110.0)
    assert outcomes.keys() == {w0.named(), w2.named()}
    for outcome in outcomes.values():
        refusal = error(outcome)
        assert isinstance(refusal, BarrierTimeout)
        assert refusal.extra["missing"] == ["w1"]
        assert "'" not in refusal.detail
    assert session.deadline is None
    assert session.version == 0
    assert equal(parameters(session), start)
    assert w2.push(values(session, 2), now=200.0) == {}
    assert w1.push(values(session, 1), now=201.0) == {}
    assert len(w0.push(values(session, 0), now=202.0)) == 3
    assert session.version == 1


@pytest.mark.parametrize(("joined", "words"), [(1, "only 1 worker has joined"), (2, "only 2 workers have joined")])
def test_a_deadline_says_how_many_have_joined(joined: int, words: str) -> None:
    """Where nobody who joined is missing, the places that were never taken are what was waited for."""
    session = new_session(consistency=sync(3, deadline_s=10.0))
    for writer in begun(session, *NAMES[:joined]):
        writer.push(values(session, 1), now=0.0)
    for outcome in session.tick(10.0).values():
        refusal = error(outcome)
        assert refusal.detail == f"The deadline passed with {joined} of 3 workers ({words}); nothing was applied."
        assert refusal.extra["missing"] == []
    assert session.deadline is None


def test_a_retry_does_not_move_the_deadline() -> None:
    """The deadline counts from the first push of a step, however often it is repeated."""
    session = new_session(consistency=sync(2, deadline_s=10.0))
    w0, _ = begun(session, "w0", "w1")
    w0.push(values(session, 1), now=0.0)
    w0.push(values(session, 1), now=9.0)
    assert session.deadline == 10.0


def test_joining_again_fences_the_push_that_waits() -> None:
    """A worker that starts anew while a push of its waits: the old one is told it was fenced, and does not count."""
    session = new_session(consistency=sync(2))
    w0, w1 = begun(session, "w0", "w1")
    start, old = parameters(session), w0.named()
    w0.push(values(session, 9))
    again = Writer.join(session, "w0")
    assert again.joined.keys() == {old}
    assert isinstance(error(again.joined[old]), Fenced)
    assert session.deadline is None
    mine, theirs = values(session, 1), values(session, 2)
    assert w1.push(theirs) == {}
    assert again.push(mine).keys() == {again.named(1), w1.named()}
    assert equal(parameters(session), Twin(start).step(mean_of(mine, theirs)))


def test_leaving_withdraws_the_push_that_waits() -> None:
    """A worker that leaves takes its push with it, and its place is free for another one."""
    session = new_session(consistency=sync(2))
    w0, w1 = begun(session, "w0", "w1")
    name = w0.named()
    w0.push(values(session, 1))
    assert session.leave("w0", w0.epoch + 1, 0.0) == {}
    outcomes = session.leave("w0", w0.epoch, 0.0)
    assert isinstance(error(outcomes[name]), Fenced)
    assert session.workers == ["w1"]
    with pytest.raises(Fenced):
        w0.push(values(session, 1))
    w2 = Writer.join(session, "w2")
    w1.push(values(session, 2))
    assert len(w2.push(values(session, 3))) == 2


def test_every_place_is_taken_once() -> None:
    """A sync session of two has no room for a third while both are present."""
    session = new_session(consistency=sync(2))
    begun(session, "w0", "w1")
    with pytest.raises(SessionFull):
        session.join("w2", 0.0)
    assert session.workers == ["w0", "w1"]


def test_the_place_of_one_who_was_missed_may_be_taken() -> None:
    """After a deadline another worker may come in for the missing one, who is fenced from then on."""
    session = new_session(consistency=sync(2, deadline_s=10.0))
    w0, w1 = begun(session, "w0", "w1")
    w0.push(values(session, 0), now=0.0)
    session.tick(10.0)
    w2 = Writer.join(session, "w2")
    assert session.workers == ["w0", "w2"]
    with pytest.raises(Fenced):
        w1.push(values(session, 1), now=11.0)
    w0.push(values(session, 0), now=12.0)
    assert w2.push(values(session, 2), now=13.0).keys() == {w0.named(), w2.named(1)}


def test_one_who_was_missed_and_comes_back_keeps_its_place() -> None:
    """A worker that was late takes part in the next step, if nobody took its place."""
    session = new_session(consistency=sync(2, deadline_s=10.0))
    w0, w1 = begun(session, "w0", "w1")
    w0.push(values(session, 0), now=0.0)
    session.tick(10.0)
    w1.push(values(session, 1), now=11.0)
    with pytest.raises(SessionFull):
        session.join("w2", 11.0)
    assert len(w0.push(values(session, 0), now=12.0)) == 2


def test_options_of_a_step_are_taken_in_the_order_of_names() -> None:
    """If workers send different options with one step, the last name's are in force, whoever came last."""
    for order in ((0, 1), (1, 0)):
        session = new_session(consistency=sync(2))
        writers = begun(session, "w0", "w1")
        for who in order:
            writers[who].push(values(session, who), groups={0: {"lr": 0.5 + who}})
        assert session.groups[0].to_options()["lr"] == 1.5


def test_workers_may_change_different_options_of_one_group() -> None:
    """What each of them changed holds, also what a control route changed while a push waited; the later name wins."""
    session = new_session(consistency=sync(2))
    first, second = begun(session, "w0", "w1")
    twin = Twin(parameters(session), lr=0.5, eps=1e-3, weight_decay=0.25)
    second.push(values(session, 1), groups={0: {"eps": 1e-3, "lr": 0.5}})
    session.set_groups({0: {"weight_decay": 0.25}})
    first.push(values(session, 1), groups={0: {"lr": 0.2}})
    assert equal(parameters(session), twin.step(values(session, 1)))
