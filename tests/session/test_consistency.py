"""What the modes do to parameters, bit for bit what torch does with the same gradients by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farstep.errors import BarrierTimeout, InvalidOption, SessionFull, TensorMismatch, Unavailable
from farstep.protocol.consistency import Async, Bounded, Consistency, Sync, to_options
from farstep.protocol.messages import PushHead, WriteName
from farstep_service.session import Session
from farstep_service.store import FlatBuffers
from farstep_service.tensors.contribution import Contribution
from farstep_service.tensors.staleness import compensate_, weigh_
from tests.session.writers import Twin, Writer, equal, error, mean_of, new_session, parameters, receipt, started, values

# -- sync ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data(), workers=st.integers(1, 4), live=st.booleans())
def test_sync_training_has_the_same_bits_in_any_order(data: st.DataObject, workers: int, live: bool) -> None:
    """However the pushes of each step arrive, parameters after five steps equal torch's on the average."""
    names = ("w0", "w1", "w2", "w3")[:workers]
    mode = Sync(workers="live") if live else Sync(workers=workers)
    session, writers, twin = started(mode, *names)
    for step in range(5):
        gradients = [values(session, 10 * step + index) for index in range(workers)]
        for index in data.draw(st.permutations(range(workers))):
            writers[index].push(gradients[index])
        for writer in writers:
            writer.last = session.position(writer.name)[1]
        twin.step(mean_of(*gradients))
    assert equal(parameters(session), twin.parameters)
    assert session.version == 5


def test_a_quorum_steps_along_the_average_of_those_who_are_there() -> None:
    """Two of three make a step, divided by two; the third is told that it came late, and changes nothing."""
    session, (w0, w1, w2), twin = started(Sync(workers=3, quorum=2))
    w2.push(values(session, 2))
    names = [w0.named(), w2.named()]
    outcomes = w0.push(values(session, 0))
    assert [(receipt(outcomes, name).contributors, receipt(outcomes, name).divisor) for name in names] == [
        (("w0", "w2"), 2)
    ] * 2
    after = twin.step(mean_of(values(session, 0), values(session, 2)))
    assert equal(parameters(session), after)
    late = w1.named()
    given = receipt(w1.push(values(session, 1), base=0), late)
    assert (given.applied, given.reason, given.version, given.staleness, given.contributors) == (
        False,
        "late",
        1,
        1,
        (),
    )
    assert equal(parameters(session), after)
    again = w1.push(values(session, 1), base=0, sequence=late.sequence)
    assert again[late].duplicate
    assert receipt(again, late) == given


def test_options_that_came_with_a_late_push_hold() -> None:
    """A worker that was answered believes the session to have its options, so the session has them."""
    session, (w0, w1, w2), _ = started(Sync(workers=3, quorum=2))
    w0.push(values(session, 0))
    w1.push(values(session, 1))
    w2.push(values(session, 2), base=0, groups={0: {"lr": 0.5}})
    assert session.groups[0].to_options()["lr"] == 0.5


@pytest.mark.parametrize(("scaling", "weight"), [("none", 1.0), ("inverse", 0.5), ("sqrt", 1 / math.sqrt(2))])
def test_a_late_gradient_that_is_folded_in_counts_as_its_staleness_says(scaling: Any, weight: float) -> None:
    """Each gradient of a step is multiplied by its own weight, and the sum is divided by how many they are."""
    mode = Sync(workers=3, quorum=2, late="fold", staleness_scaling=scaling)
    session, (w0, w1, w2), twin = started(mode)
    w0.push(values(session, 0))
    w1.push(values(session, 1))
    twin.step(mean_of(values(session, 0), values(session, 1)))
    w1.last = w0.last = session.position("w0")[1]
    w1.last -= 1
    names = [w1.named(), w2.named()]
    w2.push(values(session, 2), base=0)
    outcomes = w1.push(values(session, 3))
    twin.step(mean_of(values(session, 3), [each * weight for each in values(session, 2)]))
    assert equal(parameters(session), twin.parameters)
    assert [receipt(outcomes, name).weight for name in names] == [1.0, weight]
    assert [receipt(outcomes, name).staleness for name in names] == [0, 1]


def test_a_worker_that_dies_takes_nobodys_gradients_with_it() -> None:
    """When its lease runs out the step is taken with the survivors', at once, and the next ones do without it."""
    session, (w0, _, w2), twin = started(Sync(workers="live", lease_s=10.0))
    w0.push(values(session, 0), now=4.0)
    w2.push(values(session, 2), now=5.0)
    assert session.deadline == 10.0
    outcomes = session.tick(10.0)
    assert {name.worker for name in outcomes} == {"w0", "w2"}
    assert all(receipt(outcomes, name).divisor == 2 for name in outcomes)
    assert equal(parameters(session), twin.step(mean_of(values(session, 0), values(session, 2))))
    for writer in (w0, w2):
        writer.last = session.position(writer.name)[1]
    assert session.lease_s("w1", 10.0) == 0.0
    assert session.lease_s("w0", 10.0) > 0.0
    w2.push(values(session, 3), now=11.0)
    assert len(w0.push(values(session, 4), now=12.0)) == 2


# -- async -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["inverse", "sqrt"])
@pytest.mark.parametrize(
    ("optimizer", "options"), [("Adagrad", {"lr": 0.1}), ("AdamW", {"lr": 0.1}), ("SGD", {"lr": 0.1})]
)
def test_the_learning_rate_of_a_stale_step_is_smaller(
    scaling: Any, optimizer: str, options: Mapping[str, float]
) -> None:
    """For each step alone torch's lr is multiplied by the weight that the receipt names, which is 1 for a fresh one."""
    mode = Async(staleness_scaling=scaling)
    session, writers, _ = started(mode, optimizer=optimizer, groups=(options,), names=("w", "b", "scale"))
    twin = Twin(parameters(session), optimizer, **options)
    for step, (who, base) in enumerate([(0, 0), (1, 0), (2, 0), (0, 1), (1, 4)]):
        name, tau = writers[who].named(), step - base
        weight = 1.0 if not tau else 1 / (1 + tau) if scaling == "inverse" else 1 / math.sqrt(1 + tau)
        outcomes = writers[who].push(values(session, step), base=base)
        assert (receipt(outcomes, name).staleness, receipt(outcomes, name).weight) == (tau, weight)
        twin.optimizer.param_groups[0]["lr"] = options["lr"] * weight
        assert equal(parameters(session), twin.step(values(session, step)))
    assert session.groups[0].to_options()["lr"] == options["lr"]


def received(session: Session, writer: Writer) -> None:
    """Let a worker be sent the present version."""
    session.received(writer.name, writer.epoch, 0.0)


def test_delays_are_compensated_by_how_far_the_parameters_have_moved() -> None:
    """`g + strength * g * g * (w_now - w_base)`, with the parameters that each worker last received."""
    strength = 0.5
    session, writers, twin = started(Async(delay_compensation=strength))
    bases: dict[str, tuple[int, list[Tensor]]] = {}
    for writer in writers:
        received(session, writer)
        bases[writer.name] = session.version, parameters(session)
    for step, who in enumerate([0, 1, 1, 2, 0, 2, 2, 1]):
        writer = writers[who]
        version, base = bases[writer.name]
        gradients, now = values(session, step), parameters(session)
        made_up = [compensated(g, w, b, strength) for g, w, b in zip(gradients, now, base, strict=True)]
        writer.push(gradients, base=version)
        assert equal(parameters(session), twin.step(made_up if version != step else gradients))
        received(session, writer)
        bases[writer.name] = session.version, parameters(session)


def compensated(g: Tensor, now: Tensor, base: Tensor, strength: float) -> Tensor:
    """Return the gradient of DC-ASGD; real and imaginary parts are numbers of their own."""
    if g.is_complex():
        g, now, base = (torch.view_as_real(each) for each in (g, now, base))
        return torch.view_as_complex((now - base) * g * g * strength + g)
    return (now - base) * g * g * strength + g


def test_what_the_kept_versions_cost_is_counted_and_given_back() -> None:
    """Workers at different versions keep one copy of the parameters each; those who leave keep nothing."""
    session, writers, _ = started(Async(delay_compensation=0.1))
    for seed, writer in enumerate(writers):
        received(session, writer)
        Writer(session, "w0", 1, session.position("w0")[1]).push(values(session, seed))
    own = session.nbytes()["parameters"]
    assert session.nbytes()["versions"] >= 2 * own
    for writer in writers[1:]:
        session.leave(writer.name, writer.epoch, 0.0)
    session.set_consistency(Async(), 0.0)
    for seed in range(10):
        Writer(session, "w0", 1, session.position("w0")[1]).push(values(session, seed))
    assert session.nbytes()["versions"] == 0


def test_workers_at_one_version_share_what_is_kept_of_it() -> None:
    """However many were sent a version, it is kept once while they compute on it."""
    names = tuple(f"w{index}" for index in range(6))
    session, writers, _ = started(Async(delay_compensation=0.1), *names)
    for writer in writers:
        received(session, writer)
    for seed in range(2):
        writers[0].push(values(session, seed))
        received(session, writers[0])
    kept = session.nbytes()
    assert 0 < kept["versions"] <= 2 * kept["parameters"]


def test_a_gradient_of_parameters_that_nobody_keeps_is_stale() -> None:
    """Without them there is nothing to compensate with: it is answered, not applied, and never in silence."""
    session, (w0, w1, _), twin = started(Async(delay_compensation=0.1))
    w0.push(values(session, 0))
    twin.step(values(session, 0))
    name = w1.named()
    given = receipt(w1.push(values(session, 1), base=0), name)
    assert (given.applied, given.reason, given.version) == (False, "stale", 1)
    assert equal(parameters(session), twin.parameters)
    w1.push(values(session, 2))
    assert equal(parameters(session), twin.step(values(session, 2)))


def test_sparse_gradients_have_no_compensation() -> None:
    """They are refused by name, and their sequence is free."""
    session, (w0, *_), _ = started(Async(delay_compensation=0.1), names=("w", "b"))
    rows = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2, 4), (3, 4), check_invariants=True)
    with pytest.raises(TensorMismatch, match="'w' from worker 'w0' is sparse"):
        w0.push([rows, values(session, 1)[1]])
    w0.push(values(session, 1))
    assert session.version == 1


@pytest.mark.parametrize("half", [None, "bfloat16"])
@pytest.mark.parametrize("borrowed", [False, True])
def test_borrowed_and_narrow_gradients_are_not_changed_in_place(half: str | None, borrowed: bool) -> None:
    """What is made of a gradient is in the session's own memory and in the parameter's dtype."""
    session = new_session(names=("w", "b"))
    head = PushHead(WriteName("w0", 1, 1), "here", 0, wire_gradients=half)
    contribution = Contribution(session.plan.layout, None, (), session.plan.rule, session.groups, half)
    theirs = FlatBuffers(contribution.on_wire, zero=False)
    for index in range(2):
        theirs.segment(index).fill_(1.5)
    assert head.segments is None
    contribution.borrow(theirs)
    contribution.borrowed = borrowed
    now, base = FlatBuffers(session.plan.layout), FlatBuffers(session.plan.layout)
    now.segment(0).fill_(2.0)
    weigh_(contribution, 2.0)
    compensate_(contribution, now, base, 0.25)
    if borrowed or half:
        assert float(theirs.segment(0).float().max()) == 1.5
    own = contribution.own_()
    assert own.segment(0).dtype is torch.float32
    assert torch.equal(own.segment(0), torch.full((3, 4), 2.0 * 3 * 3 * 0.25 + 3))
    assert torch.equal(own.segment(1), torch.full(own.segment(1).shape, 3.0))


def test_rows_count_as_their_staleness_says() -> None:
    """A sparse gradient of a step of several is multiplied, too."""
    mode = Sync(workers=2, quorum=1, late="fold", staleness_scaling="inverse")
    session, (w0, w1), _ = started(mode, "w0", "w1", optimizer="SGD", names=("w",), groups=({"lr": 1.0},))
    w0.push(values(session, 1))
    session.set_consistency(Sync(workers=2, staleness_scaling="inverse"), 0.0)
    before = parameters(session)[0]
    rows = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 4), (3, 4), check_invariants=True)
    w1.push([rows], base=0)
    w0.push([torch.zeros(3, 4)])
    assert torch.equal(parameters(session)[0], before - rows.to_dense() * 0.5 / 2)


# -- bounded ---------------------------------------------------------------------------------------------------------


def test_a_push_that_is_too_far_ahead_waits_for_the_slowest() -> None:
    """Its gradient is applied after that of the slowest, and both are told what they missed."""
    session, (w0, w1), twin = started(Bounded(staleness=0), "w0", "w1")
    w0.push(values(session, 0))
    twin.step(values(session, 0))
    fast, slow = w0.named(), w1.named()
    assert w0.push(values(session, 1)) == {}
    assert session.position("w0")[2]
    outcomes = w1.push(values(session, 2), base=0)
    twin.step(values(session, 2))
    assert equal(parameters(session), twin.step(values(session, 1)))
    assert [(receipt(outcomes, name).version, receipt(outcomes, name).staleness) for name in (slow, fast)] == [
        (2, 1),
        (3, 1),
    ]


def test_a_push_that_waits_too_long_changes_nothing() -> None:
    """At the deadline it is refused, naming whom it waited for, and may be made again."""
    session, (w0, w1), _ = started(Bounded(staleness=0, deadline_s=5.0), "w0", "w1")
    w0.push(values(session, 0))
    name = w0.named()
    w0.push(values(session, 1), now=1.0)
    outcomes = session.tick(6.0)
    refusal = error(outcomes[name])
    assert isinstance(refusal, BarrierTimeout)
    assert refusal.extra["missing"] == ["w1"]
    assert session.version == 1
    w1.push(values(session, 2), base=0)
    w0.push(values(session, 1))
    assert session.version == 3


# -- switching -------------------------------------------------------------------------------------------------------


def test_a_switch_decides_about_those_who_wait() -> None:
    """From sync to async, in the middle of a barrier: each waiting push becomes a step, in the order of names."""
    session, (w0, w1, w2), twin = started(Sync(workers=3))
    w2.push(values(session, 2))
    w0.push(values(session, 0))
    names = [w0.named(), w2.named()]
    outcomes = session.set_consistency(Async(), 1.0)
    twin.step(values(session, 0))
    assert equal(parameters(session), twin.step(values(session, 2)))
    assert [receipt(outcomes, name).version for name in names] == [1, 2]
    assert session.plan.consistency == Async()
    w1.push(values(session, 1), base=0)
    assert session.version == 3


def test_a_switch_to_more_workers_keeps_those_who_wait() -> None:
    """Nothing is applied and nobody is refused: the same pushes complete the larger step."""
    session, (w0, w1), twin = started(Sync(workers=2), "w0", "w1")
    w0.push(values(session, 0))
    assert session.set_consistency(Sync(workers=3), 1.0) == {}
    w2 = Writer.join(session, "w2", 1.0)
    w1.push(values(session, 1), now=1.0)
    assert len(w2.push(values(session, 2), now=2.0)) == 3
    assert equal(parameters(session), twin.step(mean_of(*(values(session, seed) for seed in range(3)))))


def test_a_switch_to_fewer_places_than_live_workers_is_refused() -> None:
    """The error names them, and the mode is what it was; lapsed ones lose their places instead."""
    session, (w0, *_), _ = started(Sync(workers=3, lease_s=10.0))
    with pytest.raises(SessionFull, match="w0, w1, w2"):
        session.set_consistency(Sync(workers=2), 1.0)
    assert session.plan.consistency == Sync(workers=3, lease_s=10.0)
    w0.push(values(session, 0), now=9.0)
    outcomes = session.set_consistency(Sync(workers=1), 12.0)
    assert session.version == 1
    assert len(outcomes) == 1
    assert session.workers == ["w0"]


def test_a_switch_to_the_same_mode_changes_nothing() -> None:
    """Deadlines go on as they were."""
    session, (w0, *_), _ = started(Sync(workers=3, deadline_s=10.0))
    w0.push(values(session, 0), now=1.0)
    assert session.set_consistency(Sync(workers=3, deadline_s=10.0), 5.0) == {}
    assert session.deadline == 11.0


@pytest.mark.parametrize("mode", [Async(staleness_scaling="sqrt"), Async(delay_compensation=0.5)])
def test_evaluations_of_a_closure_are_never_stale(mode: Consistency) -> None:
    """LBFGS is refused where stale gradients are made up for, when it begins and when it switches."""
    with pytest.raises(InvalidOption, match="LBFGS"):
        new_session(optimizer="LBFGS", consistency=to_options(mode), groups=({},), names=("w", "b"))
    session = new_session(optimizer="LBFGS", groups=({},), names=("w", "b"))
    with pytest.raises(InvalidOption, match="LBFGS"):
        session.set_consistency(mode, 0.0)


def test_those_who_wait_are_told_that_the_server_is_about_to_end() -> None:
    """Each is told to push again, and no sequence is consumed."""
    session, (w0, w1, _), _ = started(Sync(workers=3))
    w0.push(values(session, 0))
    w1.push(values(session, 1))
    outcomes = session.interrupt(1.0)
    assert {name.worker for name in outcomes} == {"w0", "w1"}
    assert all(isinstance(error(each), Unavailable) for each in outcomes.values())
    assert session.deadline is None
    assert session.position("w0") == (1, 1, False)
