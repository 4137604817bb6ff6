"""What follows a header on its way to the server: memory, or what makes it while it is being sent."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

from farstep.transport import Batch, StreamedBody

Payload = Sequence[memoryview] | StreamedBody


def nbytes_of(payload: Payload) -> int:
    """Return its size; what is not there yet is not made for it."""
    return payload.nbytes if isinstance(payload, StreamedBody) else sum(each.nbytes for each in payload)


def batches_of(payload: Payload) -> Generator[Batch]:
    """Go through it from its beginning; what is not there yet is made."""
    if not isinstance(payload, StreamedBody):
        yield payload
        return
    with closing(payload.batches()) as batches:
        yield from batches


def never_sent(payload: Payload) -> bool:
    """Return whether a server cannot have had all of it, because it was never all there."""
    return isinstance(payload, StreamedBody) and not payload.whole
