"""Drive a decoder the way sockets do: any pieces, by either way in."""

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any, Literal

from farstep.protocol import Decoder, Limits

Way = Literal["feed", "buffer"]


def drive(
    decoder: Decoder, body: bytes, *, pieces: Iterable[int] = (1 << 20,), ways: Iterable[Way] = ("feed",)
) -> None:
    """Give `body` to the decoder in pieces of these sizes, by these ways in, each taken in turn."""
    at, sizes, turns = 0, cycle(pieces), cycle(ways)
    while at < len(body):
        count = min(next(sizes), len(body) - at)
        if next(turns) == "feed":
            decoder.feed(body[at : at + count])
        else:
            target = decoder.get_buffer()
            count = min(count, len(target))
            target[:count] = body[at : at + count]
            decoder.buffer_updated(count)
        at += count


def read(
    body: bytes,
    sizes: Sequence[int],
    *,
    pieces: Iterable[int] = (1 << 20,),
    ways: Iterable[Way] = ("feed",),
    limits: Limits | None = None,
) -> tuple[dict[str, Any], list[bytes]]:
    """Return the header of a complete message and its payload, cut into these sizes."""
    memory = [bytearray(size) for size in sizes]
    decoder = Decoder(lambda header: [memoryview(each) for each in memory], limits=limits or Limits())
    drive(decoder, body, pieces=pieces, ways=ways)
    decoder.close()
    assert decoder.done
    assert decoder.received == decoder.payload_bytes == sum(sizes)
    return decoder.header, list(map(bytes, memory))
