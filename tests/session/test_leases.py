"""Leases that are renewed without a write: what a heartbeat means to those who wait, in each mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from farstep.errors import (
    FarstepError,
    Fenced,
    IdempotencyMismatch,
    InvalidOption,
    NonFinite,
    OptionsDiffer,
    ReceiptExpired,
    SequenceGap,
    SessionFull,
    SessionLost,
    TensorMismatch,
)
from farstep.protocol.consistency import Async, Bounded, Consistency, Sync, to_options
from farstep_service.coordinator.roster import RECEIPTS_KEPT
from farstep_service.session import Session
from tests.session.writers import Writer, begun, error, new_session, receipt, values

NAMES = ("w0", "w1")
LEASE_S = 10.0


def started(mode: Consistency) -> tuple[Session, Writer, Writer]:
    session = new_session(consistency=to_options(mode))
    w0, w1 = begun(session, *NAMES)
    return session, w0, w1


def renew(session: Session, writer: Writer, now: float) -> tuple[bool, int]:
    return session.renew(writer.name, writer.epoch, session.incarnation, now)


@pytest.mark.parametrize(
    "mode",
    [Async(lease_s=LEASE_S), Sync(workers=2, lease_s=LEASE_S), Bounded(staleness=1, lease_s=LEASE_S)],
    ids=lambda mode: mode.mode,
)
def test_a_heartbeat_is_a_lease_more(mode: Consistency) -> None:
    """The lease begins anew with each; one that comes too late says so, and counts from then on."""
    session, w0, w1 = started(mode)
    assert renew(session, w0, 9.0) == (False, 2)
    assert session.lease_s("w0", 12.0) == 7.0
    assert session.lease_s("w1", 12.0) == 0.0
    assert renew(session, w0, 18.0) == (False, 1)
    assert renew(session, w1, 20.0) == (True, 2)
    assert session.lease_s("w1", 20.0) == LEASE_S
    assert session.version == 0
    assert session.position("w1") == (w1.epoch, w1.last, False)


def test_a_push_that_waits_needs_no_heartbeat() -> None:
    """Who waits for others is live, and its lease begins when it is answered; a heartbeat meanwhile changes nothing."""
    session, w0, w1 = started(Sync(workers=2, deadline_s=100.0, lease_s=LEASE_S))
    w0.push(values(session, 0), now=1.0)
    assert session.lease_s("w0", 50.0) == LEASE_S
    assert renew(session, w0, 50.0) == (False, 1)
    outcomes = w1.push(values(session, 1), now=60.0)
    assert [receipt(outcomes, name).divisor for name in outcomes] == [2, 2]
    assert session.lease_s("w0", 65.0) == 5.0


def test_the_others_wait_for_a_worker_that_is_heard_of() -> None:
    """In a step of live workers one that evaluates is waited for while it sends heartbeats, and not any longer."""
    session, w0, w1 = started(Sync(workers="live", deadline_s=100.0, lease_s=LEASE_S))
    assert w0.push(values(session, 0), now=4.0) == {}
    renew(session, w1, 9.0)
    assert session.tick(10.0) == {}
    renew(session, w1, 18.0)
    assert session.tick(27.0) == {}
    outcomes = session.tick(28.0)
    assert [receipt(outcomes, name).contributors for name in outcomes] == [("w0",)]


def test_nobody_runs_ahead_of_a_worker_that_is_heard_of() -> None:
    """In a bounded session the fast wait for one that evaluates, as long as it sends heartbeats."""
    session, w0, w1 = started(Bounded(staleness=1, deadline_s=100.0, lease_s=LEASE_S))
    for seed in range(2):
        assert len(w0.push(values(session, seed), now=1.0)) == 1
    renew(session, w1, 9.0)
    assert w0.push(values(session, 2), now=9.0) == {}
    assert session.tick(18.0) == {}
    assert len(session.tick(19.0)) == 1


def test_a_place_is_not_taken_from_a_worker_that_is_heard_of() -> None:
    """A newcomer finds no place while the worker that evaluates is live, and its place once it is not."""
    session, w0, w1 = started(Sync(workers=2, lease_s=LEASE_S))
    for writer in (w0, w1):
        renew(session, writer, 9.0)
    with pytest.raises(SessionFull):
        session.join("w2", 18.0)
    renew(session, w0, 18.0)
    session.join("w2", 19.0)
    assert session.workers == ["w0", "w2"]


@pytest.mark.parametrize(
    ("worker", "epoch", "incarnation", "kind", "said"),
    [
        ("w0", 1, "here", Fenced, "epoch 2 is current"),
        ("w0", 3, "here", Fenced, "epoch 2 is current"),
        ("w1", 1, "there", SessionLost, "created anew"),
        ("w7", 1, "here", Fenced, "not a member"),
    ],
)
def test_who_is_not_this_worker_renews_nothing(
    worker: str, epoch: int, incarnation: str, kind: type[FarstepError], said: str
) -> None:
    """An older or unknown epoch, another life of the session and a stranger are refused; leases are as they were."""
    session, _, _ = started(Async(lease_s=LEASE_S))
    session.join("w0", 2.0)
    with pytest.raises(kind, match=said):
        session.renew(worker, epoch, incarnation, 5.0)
    assert [session.lease_s(name, 5.0) for name in NAMES] == [7.0, 5.0]


Request = Callable[[Session, Writer], object]


def nan(session: Session) -> list[torch.Tensor]:
    return [torch.full_like(each, torch.nan) for each in values(session, 1)]


REFUSED: list[tuple[str, type[FarstepError], Request]] = [
    ("push of a fenced epoch", Fenced, lambda s, w: replace(w, epoch=7).push(values(s, 1), now=6.0)),
    ("push of another life", SessionLost, lambda s, w: w.push(values(s, 1), incarnation="there", now=6.0)),
    ("push after a gap", SequenceGap, lambda s, w: w.push(values(s, 1), sequence=w.last + 2, now=6.0)),
    ("push of other content", IdempotencyMismatch, lambda s, w: w.push(values(s, 2), sequence=w.last, now=6.0)),
    ("push of long ago", ReceiptExpired, lambda s, w: w.push(values(s, 1), sequence=1, now=6.0)),
    ("push of NaN", NonFinite, lambda s, w: w.push(nan(s), now=6.0)),
    ("push with a wrong option", InvalidOption, lambda s, w: w.push(values(s, 1), groups={0: {"no": 1.0}}, now=6.0)),
    ("push to a version to come", TensorMismatch, lambda s, w: w.push(values(s, 1), base=s.version + 1, now=6.0)),
    ("contents of a fenced epoch", Fenced, lambda s, w: replace(w, epoch=7).put({"param": values(s, 1)}, now=6.0)),
    ("contents after a gap", SequenceGap, lambda s, w: w.put({"param": values(s, 1)}, sequence=w.last + 2, now=6.0)),
    ("contents of another life", SessionLost, lambda s, w: w.put({"param": values(s, 1)}, incarnation="x", now=6.0)),
    ("contents under a taken name", IdempotencyMismatch, lambda s, w: w.put({"param": values(s, 3)}, sequence=w.last)),
    ("a field that is not there", InvalidOption, lambda s, w: w.put({"momentum": values(s, 1)}, now=6.0)),
    ("a group after a gap", SequenceGap, lambda s, w: w.append({"x": torch.ones(2)}, sequence=w.last + 2, now=6.0)),
    ("a group of a fenced epoch", Fenced, lambda s, w: replace(w, epoch=7).append({"x": torch.ones(2)}, now=6.0)),
    ("a group that is another", OptionsDiffer, lambda s, w: w.append({"x": torch.ones(2)}, group=0, now=6.0)),
    ("a group before others", InvalidOption, lambda s, w: w.append({"x": torch.ones(2)}, group=5, now=6.0)),
    ("a join without a place", SessionFull, lambda s, w: s.join("w2", 6.0)),
    ("a mode without places", SessionFull, lambda s, w: s.set_consistency(Sync(workers=1), 6.0)),
]


@pytest.mark.parametrize(("kind", "request_"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_refused_leaves_no_trace(kind: type[FarstepError], request_: Request) -> None:
    """Whatever is wrong with a request: leases, places, sequences and the version are as they were."""
    session, w0, w1 = started(Sync(workers=2, quorum=1, lease_s=LEASE_S))
    for _ in range(RECEIPTS_KEPT + 1):
        w0.push(values(session, 1), now=1.0)

    def trace() -> object:
        return [(session.position(n), session.lease_s(n, 6.0)) for n in session.workers], session.version, session.plan

    before = trace()
    with pytest.raises(kind):
        request_(session, w0)
    assert trace() == before
    assert session.workers == [*NAMES]
    assert w1.last == 0


def test_a_refused_push_does_not_bring_a_worker_back() -> None:
    """One whose lease has run out is still not waited for: the others step without it."""
    session, w0, w1 = started(Sync(workers="live", lease_s=LEASE_S))
    with pytest.raises(NonFinite):
        w1.push(nan(session), now=LEASE_S + 1)
    assert session.lease_s("w1", LEASE_S + 1) == 0.0
    name = w0.named()
    assert receipt(w0.push(values(session, 0), now=LEASE_S + 1), name).divisor == 1


def test_a_repeated_push_is_a_sign_of_life() -> None:
    """It is answered with its receipt, and renews the lease like any write that is not refused."""
    session, w0, _ = started(Async(lease_s=LEASE_S))
    w0.push(values(session, 1), now=1.0)
    w0.push(values(session, 1), base=0, sequence=w0.last, now=6.0)
    assert session.lease_s("w0", 6.0) == LEASE_S


def test_a_push_that_waits_is_taken_back_when_its_name_is_taken() -> None:
    """Its worker is told what happened and what to do, and nothing was applied."""
    session, w0, _ = started(Sync(workers=2))
    w0.push(values(session, 0), now=1.0)
    _, outcomes = session.join("w0", 2.0)
    (told,) = map(error, outcomes.values())
    assert isinstance(told, Fenced)
    assert str(told).endswith(
        "'w0' joined again while this push waited; it was not applied. "
        "If that was another process, give each its own name."
    )
    assert session.version == 0


def test_a_repeated_push_does_not_hide_that_a_barrier_is_complete() -> None:
    """It renews one lease at the moment at which another runs out: there is something to decide at once, not later."""
    session = new_session(consistency=to_options(Sync(workers="live", deadline_s=60.0, lease_s=LEASE_S)))
    w0, w1, w2 = begun(session, "w0", "w1", "w2")
    first = values(session, 1)
    for writer in (w0, w1, w2):
        writer.push(first, now=0.0)
    for writer in (w0, w1, w2):
        writer.last = session.position(writer.name)[1]
    committed = w0.last
    w0.push(values(session, 2), now=5.0)
    w2.push(values(session, 3), now=5.0)
    w0.push(first, sequence=committed, now=LEASE_S)
    assert session.deadline == LEASE_S
    assert {name.worker for name in session.tick(LEASE_S)} == {"w0", "w2"}


def test_a_worker_that_comes_back_does_not_wait_for_one_that_has_just_joined() -> None:
    """The slowest left while the other's lease had run out unnoticed: the new one begins where the other stands."""
    session = new_session(consistency=to_options(Bounded(staleness=0, lease_s=4.0, deadline_s=60.0)))
    fast, slow = begun(session, "fast", "slow")
    fast.push(values(session, 1), now=0.0)
    renew(session, slow, 3.0)
    session.leave("slow", slow.epoch, 5.0)
    session.join("new", 5.0)
    name = fast.named()
    assert receipt(fast.push(values(session, 2), now=5.0), name).applied
