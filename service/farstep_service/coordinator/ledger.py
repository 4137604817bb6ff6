"""Exactly once: which writes have happened, and what their makers were told.

A write is named by (worker, epoch, sequence); the session is the one the ledger belongs to.

    incoming                                  answer                       state
    next in sequence                          it is new                    +1 when it is committed
    seen before, same content                 the original receipt         unchanged
    seen before, other content                IdempotencyMismatch          unchanged
    seen before, its receipt is not kept      ReceiptExpired               unchanged
    a gap                                     SequenceGap with the next    unchanged
    older epoch, or not a member              Fenced                       unchanged

A write that is refused later (validation, a barrier that times out) is never committed, so its sequence is not
consumed. The last 64 receipts of a worker are kept: of an older write it is known that it was committed, but neither
what it held nor what became of it, so no repetition of it is answered as if that were known.

The page of a worker that left, was displaced or has been away for long is forgotten. Of all such pages one number is
kept, their highest epoch: whoever joins without a page begins above it. So a write of a forgotten epoch is fenced for
ever, whoever sends it and whatever became of it, and nothing is applied twice.
Pure: no clock, no lock, no I/O.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from farstep.errors import Fenced, IdempotencyMismatch, ReceiptExpired, SequenceGap
from farstep.messages import WriteName
from farstep.receipt import Receipt

RECEIPTS_KEPT = 64
"""Receipts of each worker's last writes that are kept."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A committed write: what it held and what its maker was told."""

    fingerprint: str
    receipt: Receipt


@dataclass(slots=True)
class _Page:
    epoch: int
    last: int = 0
    entries: OrderedDict[int, Entry] = field(default_factory=OrderedDict)


class Ledger:
    """Remember the committed writes of one session, by worker."""

    def __init__(self) -> None:
        self._pages: dict[str, _Page] = {}
        self._forgotten = 0  # the highest epoch of a page that was

    def __len__(self) -> int:
        return len(self._pages)

    def join(self, worker: str) -> int:
        """Begin a new epoch of `worker`, fencing the older ones, and return it."""
        old = self._pages.get(worker)
        epoch = old.epoch + 1 if old else self._forgotten + 1
        self._pages[worker] = _Page(epoch)
        return epoch

    def forget(self, worker: str) -> None:
        """Let a worker's page go; its epochs are over."""
        old = self._pages.pop(worker, None)
        if old is not None:
            self._forgotten = max(self._forgotten, old.epoch)

    def epoch(self, worker: str) -> int:
        """Return the current epoch of `worker`, 0 if it is not a member."""
        page = self._pages.get(worker)
        return page.epoch if page else 0

    def last(self, worker: str) -> int:
        """Return the sequence of the last committed write in the current epoch, 0 if there is none."""
        page = self._pages.get(worker)
        return page.last if page else 0

    def judge(self, name: WriteName, fingerprint: str | None) -> Receipt | None:
        """Return None for a write that is next in sequence, or the receipt of one that was committed before.

        Args:
            fingerprint: what identifies the content; None while it is not known yet (before the body).

        Raises:
            Fenced: the epoch is not the worker's current one.
            SequenceGap: a write before this one is missing (`extra["expected"]`).
            IdempotencyMismatch: another content was committed under this name.
            ReceiptExpired: something was committed under it so long ago that its receipt is not kept any more.
        """
        page = self._page(name.worker, name.epoch)
        if name.sequence == page.last + 1:
            return None
        if name.sequence > page.last:
            raise SequenceGap(
                f"Worker {name.worker!r} wrote sequence {name.sequence}, expected {page.last + 1}.",
                remedy="Send the missing write first.",
                field="seq",
                expected=page.last + 1,
            )
        entry = page.entries.get(name.sequence)
        if entry is None:
            raise ReceiptExpired(
                f"Sequence {name.sequence} of worker {name.worker!r} was committed, and writes up to {page.last} after "
                f"it; its receipt is gone, since only those of the last {RECEIPTS_KEPT} writes are kept.",
                remedy="Do not send it again: nothing is applied twice. Go on with the next sequence.",
                field="seq",
                limit=RECEIPTS_KEPT,
                last=page.last,
            )
        if fingerprint is not None and fingerprint != entry.fingerprint:
            raise mismatch(name)
        return entry.receipt

    def check(self, worker: str, epoch: int) -> None:
        """Refuse an epoch that is over.

        Raises:
            Fenced: it is.
        """
        self._page(worker, epoch)

    def _page(self, worker: str, epoch: int) -> _Page:
        page = self._pages.get(worker)
        if page is None or epoch != page.epoch:
            current = f"epoch {page.epoch} is current" if page else "it is not a member"
            raise Fenced(
                f"Worker {worker!r} comes as epoch {epoch}, but {current}.",
                remedy="Another process joined under the same name, or the worker was away so long that its place went "
                "to another: give each worker its own name, or join again.",
                field="epoch",
                limit=page.epoch if page else 0,
            )
        return page

    def commit(self, name: WriteName, fingerprint: str, receipt: Receipt) -> None:
        """Record a write that `judge` called new, with what its maker is told."""
        page = self._pages[name.worker]
        page.last = name.sequence
        page.entries[name.sequence] = Entry(fingerprint, receipt)
        if len(page.entries) > RECEIPTS_KEPT:
            page.entries.popitem(last=False)


def mismatch(name: WriteName) -> IdempotencyMismatch:
    """Return the error for another content under a name that is taken."""
    return IdempotencyMismatch(
        f"Sequence {name.sequence} of worker {name.worker!r} was sent before with another content.",
        remedy="A retry must repeat the same bytes; a new step needs the next sequence.",
        field="seq",
    )
