"""The names of one worker's writes, and what becomes of a write that got no answer.

    a write ──► committed        the next sequence follows
            ──► refused          its sequence is free again; so it is if its payload was never made to its end
            ──► no answer        unknown; before the next write the server is asked where the worker stands:

    it says                next write has the same content      next write has another content
    committed              repeated: its receipt comes back     the next sequence; the earlier write was applied
    waits at a barrier     repeated: it joins the result        asked again, until the barrier has decided
    neither                repeated                             the same sequence; the earlier write was dropped

So no write is applied twice, whether the caller tries a step again or goes on with another one, and the report of the
next step tells what became of the earlier one. A write that was given up may still be on its way and arrive after the
server was asked: then whichever comes second under that name is refused as `IdempotencyMismatch`, and the server is
asked again. A param group that was added without its caller's knowledge (`outgrown`) has to be added again first: until
then the worker's gradients are not those of all parameters.

Pure: no clock, no I/O.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from farstep.errors import FarstepError, ReceiptExpired
from farstep.protocol.messages import WriteName
from farstep.transport.pieces import Payload, batches_of, never_sent

Fate = Literal["applied", "dropped"]
"""What became of a write that got no answer and was not repeated."""

NOT_CONTENT = frozenset({"seq", "base", "have", "area", "fill", "deliver"})
"""Header keys that do not tell one write from another; a write that is repeated keeps those of its first time."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A write whose outcome is unknown."""

    header: Mapping[str, Any]
    digest: bytes

    @property
    def sequence(self) -> int:
        """Return its place among the worker's writes."""
        return int(self.header["seq"])

    def has_content_of(self, header: Mapping[str, Any], payload: Payload) -> bool:
        """Return whether another write is this one again."""
        return _content(self.header) == _content(header) and self.digest == digest_of(payload)


class Names:
    """Name the writes of one worker.

    Attributes:
        epoch: the worker's current life in the session; 0 before it has joined.
        unanswered: the write whose outcome was unknown, until another one is committed.
        unsure: whether the server must be asked before the next write.
        earlier: what became of a write that got no answer, until it is taken by `tell`.
    """

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.join(0)
        self.earlier: Fate | None = None

    def join(self, epoch: int) -> None:
        """Begin a new epoch."""
        self.epoch = epoch
        self.unanswered: Unanswered | None = None
        self.unsure = False
        self._committed = 0

    @property
    def outgrown(self) -> bool:
        """Return whether a param group was added by a write that got no answer, so that its caller does not know it."""
        before = self.unanswered
        return before is not None and "group" in before.header and before.sequence <= self._committed

    @property
    def last(self) -> int:
        """Return the sequence of the last write that was acknowledged in this epoch; 0 before the first one."""
        return self._committed

    def next(self) -> WriteName:
        """Return the name of the next new write."""
        return WriteName(self.worker, self.epoch, self._committed + 1)

    def committed(self, sequence: int) -> None:
        """Take note that a write was answered."""
        self._committed = sequence
        self.unanswered, self.unsure = None, False

    def failed(self, header: Mapping[str, Any], payload: Payload, error: BaseException) -> None:
        """Take note that a write ended in an error: refused, unknown, or committed with a receipt that is gone."""
        if isinstance(error, ReceiptExpired):
            self.unanswered, self.unsure, self.earlier = None, True, "applied"
            return
        if not is_refusal(error) and ("area" in header or not never_sent(payload)):
            again = {key: value for key, value in header.items() if key != "deliver"}
            self.unanswered, self.unsure = Unanswered(again, digest_of(payload)), True

    def mismatched(self, sequence: int) -> bool:
        """Take note that a name is taken; return whether an unanswered write of ours explains it."""
        self.unsure = True
        return self.unanswered is not None and self.unanswered.sequence == sequence

    def learn(self, sequence: int) -> None:
        """Take over the last committed sequence from the server, and what it says about the unanswered write."""
        self._committed = sequence
        self.unsure = False
        if self.unanswered is not None:
            self.earlier = "applied" if self.unanswered.sequence <= sequence else "dropped"

    def tell(self) -> Fate | None:
        """Return what became of an earlier write, once."""
        earlier, self.earlier = self.earlier, None
        return earlier


def digest_of(payload: Payload) -> bytes:
    """Return what identifies a payload, at about 1 GB/s."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches_of(payload):
        for view in batch:
            digest.update(view)
    return digest.digest()


def _content(header: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in header.items() if key not in NOT_CONTENT}


def is_refusal(error: BaseException) -> bool:
    """Return whether the server has decided that the write did not happen."""
    return isinstance(error, FarstepError) and error.side == "server" and error.status < 500
