"""What the next write is called, decided from what is known of the one before."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from farstep.errors import BarrierTimeout, InvalidRequest, NonFinite, ReceiptExpired, StepInterrupted, Unavailable
from farstep.http_link.sequence import Names
from farstep.protocol.growth import AppendHead
from farstep.protocol.messages import PushHead
from farstep.transport import Batch, StreamedBody

PAYLOAD = [memoryview(b"gradients"), memoryview(b"of two tensors")]


def joined() -> Names:
    names = Names("w0")
    names.join(3)
    return names


def header(names: Names, *, base: int = 0, lr: float = 0.1) -> dict[str, object]:
    return PushHead(names.next(), "life", base, groups={0: {"lr": lr}}).to_header()


def test_committed_writes_count_up() -> None:
    """Each committed write takes the next sequence of its epoch; a new epoch starts at 1."""
    names = joined()
    for sequence in (1, 2, 3):
        assert names.next().to_header() == {"worker": "w0", "epoch": 3, "seq": sequence}
        names.committed(sequence)
    names.join(4)
    assert names.next().to_header() == {"worker": "w0", "epoch": 4, "seq": 1}


@pytest.mark.promise("A refused push uses no sequence number: the next good one goes under it.", area="exactly once")
@pytest.mark.parametrize("error", [NonFinite("NaN"), BarrierTimeout("late")])
def test_a_refusal_frees_the_sequence(error: Exception) -> None:
    """What the server refused did not happen: nobody needs to be asked."""
    names = joined()
    names.failed(header(names), PAYLOAD, error)
    assert not names.unsure
    assert names.next().sequence == 1


@pytest.mark.promise(
    "A push whose receipt is no longer kept is not applied again, and no receipt is made up.",
    area="exactly once",
)
def test_a_receipt_that_is_not_kept_any_more_frees_nothing() -> None:
    """The write was applied, once: the server says which sequence is next, and the next report that it was."""
    names = joined()
    names.failed(header(names), PAYLOAD, ReceiptExpired("long ago", last=90))
    assert names.unsure
    assert names.unanswered is None
    names.learn(90)
    assert names.next().sequence == 91
    assert names.tell() == "applied"


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("gone", side="client"),
        StepInterrupted("later"),
        InvalidRequest("?", side="client"),
        KeyboardInterrupt(),
    ],
)
def test_without_the_servers_word_an_outcome_is_unknown(error: BaseException) -> None:
    """No answer, one that cannot be read, or an interrupt: the server has to be asked."""
    names = joined()
    names.failed(header(names), PAYLOAD, error)
    assert names.unsure


def test_a_payload_that_was_never_whole_frees_the_sequence() -> None:
    """Nobody can have committed what was not made to its end; once it was, nobody knows."""

    def begin() -> Generator[Batch]:
        yield [b"gradients"]
        yield [b"of two tensors"]

    names, payload = joined(), StreamedBody(begin, 23)
    batches = payload.batches()
    next(batches)
    names.failed(header(names), payload, KeyboardInterrupt())
    assert not names.unsure
    next(batches)
    names.failed(header(names), payload, KeyboardInterrupt())
    assert names.unsure
    assert names.unanswered is not None
    assert names.unanswered.has_content_of(header(names), PAYLOAD)


@pytest.mark.parametrize(("last", "earlier"), [(1, "applied"), (0, "dropped")])
def test_the_server_tells_what_became_of_it(last: int, earlier: str) -> None:
    """Its last committed sequence decides the next name and the fate of the write, which is told once."""
    names = joined()
    names.failed(header(names), PAYLOAD, Unavailable("gone", side="client"))
    names.learn(last)
    assert names.next().sequence == last + 1
    names.committed(last + 1)
    assert (names.tell(), names.tell()) == (earlier, None)


def test_a_write_is_known_again_by_its_content() -> None:
    """Equal payload and header, but for the name and the versions held, are the same write again."""
    names = joined()
    names.failed(header(names), PAYLOAD, Unavailable("gone", side="client"))
    before = names.unanswered
    assert before is not None
    assert before.has_content_of(header(names), PAYLOAD)
    assert before.has_content_of(header(names, base=7), [memoryview(b"".join(PAYLOAD))])
    assert not before.has_content_of(header(names, lr=0.2), PAYLOAD)
    assert not before.has_content_of(header(names), [memoryview(b"Gradients"), PAYLOAD[1]])


def test_a_name_that_is_taken_is_explained_by_a_late_write_only() -> None:
    """A write that was given up and came late explains a mismatch under its name, once; nothing else does."""
    names = joined()
    assert not names.mismatched(1)
    assert names.unsure
    names.failed(header(names), PAYLOAD, Unavailable("gone", side="client"))
    names.learn(0)
    assert names.mismatched(1)
    names.learn(1)
    assert names.earlier == "applied"
    assert not names.mismatched(2)


def test_a_group_that_was_added_without_an_answer_is_outgrown_until_it_is_added_again() -> None:
    """Whether it was is known when the server has been asked; a push in its place, or the group again, settles it."""
    names = joined()
    group = AppendHead(names.next(), "life", 1, {"lr": 0.3}, ()).to_header()
    names.failed(group, PAYLOAD, Unavailable("lost"))
    assert not names.outgrown, "nobody knows yet"
    names.learn(0)
    assert not names.outgrown, "it never arrived"
    names.learn(1)
    assert names.outgrown
    names.committed(2)
    assert not names.outgrown
    names.failed(header(names), PAYLOAD, Unavailable("lost"))
    names.learn(3)
    assert not names.outgrown, "a push makes no session grow"
