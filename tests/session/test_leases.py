"""Leases that are renewed without a write: what a heartbeat means to those who wait, in each mode."""

from __future__ import annotations

import pytest

from farstep.consistency import Async, Bounded, Consistency, Sync, to_options
from farstep.errors import FarstepError, Fenced, SessionFull, SessionLost
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
