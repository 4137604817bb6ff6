"""The exactly-once table, row by row, and against a small model of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farstep.errors import Fenced, IdempotencyMismatch, ReceiptExpired, SequenceGap
from farstep.protocol.messages import WriteName
from farstep.protocol.receipt import Receipt
from farstep_service.coordinator.roster import RECEIPTS_KEPT, Roster


def committed(roster: Roster, name: WriteName, content: str = "a") -> Receipt:
    receipt = Receipt(version=name.sequence, base=name.sequence - 1)
    assert roster.judge(name, content) is None
    roster.commit(name, content, receipt)
    return receipt


def test_the_next_sequence_is_new() -> None:
    """A write that is next in sequence is new until it is committed."""
    roster = Roster(None, 60.0)
    epoch = roster.join("w0", 0.0)
    assert roster.judge(WriteName("w0", epoch, 1), "a") is None
    assert roster.judge(WriteName("w0", epoch, 1), "a") is None
    assert roster.sequence("w0") == 0


def test_a_write_seen_before_gets_its_first_receipt() -> None:
    """A retry of a committed write is answered with the original receipt."""
    roster = Roster(None, 60.0)
    name = WriteName("w0", roster.join("w0", 0.0), 1)
    receipt = committed(roster, name)
    assert roster.judge(name, "a") is receipt


def test_another_content_under_a_taken_name_is_refused() -> None:
    """The same name with another content is an error, and changes nothing."""
    roster = Roster(None, 60.0)
    name = WriteName("w0", roster.join("w0", 0.0), 1)
    committed(roster, name)
    with pytest.raises(IdempotencyMismatch):
        roster.judge(name, "b")
    assert roster.sequence("w0") == 1


def test_a_gap_names_the_expected_sequence() -> None:
    """A write after a gap is refused with the number that is expected."""
    roster = Roster(None, 60.0)
    epoch = roster.join("w0", 0.0)
    with pytest.raises(SequenceGap) as refused:
        roster.judge(WriteName("w0", epoch, 3), "a")
    assert refused.value.extra["expected"] == 1


def test_an_older_epoch_is_fenced() -> None:
    """A worker that joined again fences its older epoch, whose writes start anew at 1."""
    roster = Roster(None, 60.0)
    old = roster.join("w0", 0.0)
    committed(roster, WriteName("w0", old, 1))
    new = roster.join("w0", 0.0)
    assert new == old + 1
    with pytest.raises(Fenced):
        roster.judge(WriteName("w0", old, 2), "a")
    assert roster.judge(WriteName("w0", new, 1), "a") is None


def test_a_worker_that_never_joined_is_fenced() -> None:
    """A write of a worker nobody knows is refused."""
    with pytest.raises(Fenced):
        Roster(None, 60.0).judge(WriteName("w0", 1, 1), "a")


@pytest.mark.parametrize("content", ["a", "b", None])
def test_no_receipt_is_invented_for_a_write_older_than_those_kept(content: str | None) -> None:
    """A retry of a write whose receipt is gone is refused with what is known, whatever it holds; the next are kept."""
    roster = Roster(None, 60.0)
    epoch = roster.join("w0", 0.0)
    for sequence in range(1, RECEIPTS_KEPT + 3):
        committed(roster, WriteName("w0", epoch, sequence))
    for sequence in (1, 2):
        with pytest.raises(ReceiptExpired) as refused:
            roster.judge(WriteName("w0", epoch, sequence), content)
        assert refused.value.extra["last"] == RECEIPTS_KEPT + 2
        assert refused.value.limit == RECEIPTS_KEPT
    oldest = roster.judge(WriteName("w0", epoch, 3), "a")
    assert oldest is not None
    assert oldest.version == 3


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 5), st.sampled_from("xy")), max_size=60))
def test_any_mix_of_retries_gaps_and_changes_agrees_with_a_dict(writes: list[tuple[str, int, str]]) -> None:
    """Whatever arrives, each name is committed at most once, in sequence, with the content that came first."""
    roster = Roster(None, 60.0)
    epochs = {worker: roster.join(worker, 0.0) for worker in "ab"}
    model: dict[str, list[str]] = {"a": [], "b": []}
    for worker, sequence, content in writes:
        name, seen = WriteName(worker, epochs[worker], sequence), model[worker]
        if sequence == len(seen) + 1:
            committed(roster, name, content)
            seen.append(content)
        elif sequence > len(seen):
            with pytest.raises(SequenceGap):
                roster.judge(name, content)
        elif seen[sequence - 1] == content:
            receipt = roster.judge(name, content)
            assert receipt is not None
            assert receipt.version == sequence
        else:
            with pytest.raises(IdempotencyMismatch):
                roster.judge(name, content)
        assert roster.sequence(worker) == len(seen)
