"""Messages of the data routes: as the body of a request, and from the body of an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import httpx

from farstep.conversation.replies import CHECK_URL
from farstep.errors import InvalidAnswer, InvalidRequest, LimitExceeded, ResponseTooLarge
from farstep.protocol import Decoder, Frames, encode, encoded_size
from farstep.protocol.packing import pack_header
from farstep.transport import Answer, Batch, BufferedBody, StreamedBody
from farstep.transport.pieces import Payload, batches_of, nbytes_of

HOT_BYTES: Final = 256 * 1024
"""Bytes of an answer to receive at once, at most, where they are processed next while a cache has them."""

BuffersFor = Callable[[dict[str, Any]], Sequence[memoryview]]
Arrived = Callable[[int], object]
"""Called with the number of payload bytes that have arrived so far."""


@dataclass(frozen=True, slots=True)
class Received:
    """An answer of a data route: its header, its payload's size, and how long the payload took to arrive."""

    header: dict[str, Any]
    payload_bytes: int
    receive_s: float


def received(answer: Answer, buffers_for: BuffersFor, arrived: Arrived | None) -> Received:
    """Receive a message.

    Raises:
        ResponseTooLarge, InvalidAnswer: it violates the protocol.
        httpx.TransportError: it was cut off.
    """
    began = time.perf_counter()
    decoder, body = Decoder(buffers_for, side="client"), answer.body
    try:
        early = body.arrived()
        decoder.feed(early)
        body.skip(len(early))
        if arrived is not None:
            arrived(decoder.received)
        while not decoder.done:
            buffer = decoder.get_buffer()
            count = body.readinto(buffer if arrived is None else buffer[:HOT_BYTES])
            if not count:
                if not answer.head.framed:
                    raise httpx.RemoteProtocolError("the answer was cut off")
                decoder.close()
            decoder.buffer_updated(count)
            if arrived is not None:
                arrived(decoder.received)
        if body.readinto(memoryview(bytearray(1))):
            raise InvalidAnswer("The answer goes on behind its payload.", field="payload", side="client")
    except InvalidAnswer:
        raise
    except LimitExceeded as exc:
        raise ResponseTooLarge(exc.detail, field=exc.field, limit=exc.limit, remedy=CHECK_URL, side="client") from exc
    except InvalidRequest as exc:
        raise InvalidAnswer(exc.detail, field=exc.field, limit=exc.limit, remedy=CHECK_URL, side="client") from exc
    return Received(decoder.header, decoder.payload_bytes, time.perf_counter() - began)


def message(header: Mapping[str, Any], payload: Payload) -> BufferedBody | StreamedBody:
    """Return the body of a request; a streamed payload is made while it is sent."""
    if not isinstance(payload, StreamedBody):
        return BufferedBody(encode(header, payload, side="client"))
    packed = pack_header(header, side="client")
    return StreamedBody(partial(_framed, packed, payload), encoded_size(len(packed), payload.nbytes))


def _framed(packed: bytes, payload: Payload) -> Generator[Batch]:
    frames = Frames(nbytes_of(payload))
    first = [packed]
    with closing(batches_of(payload)) as batches:
        for batch in batches:
            yield [*first, *frames.cut(map(memoryview, batch))]
            first = []
    yield first
