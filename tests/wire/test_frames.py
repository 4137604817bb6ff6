"""Writing messages: frames, sizes, no copies, any size."""

import mmap
import struct
from itertools import accumulate, pairwise
from typing import Any

import msgpack
import pytest

from farstep.errors import InvalidRequest, LimitExceeded
from farstep.protocol import MAX_FRAME_BYTES, Decoder, Frames, Limits, encode, encoded_size
from tests.support.wire.driving import read

MIB = 1 << 20


def prefixes(buffers: list[bytes | memoryview]) -> list[int]:
    """Return the frame sizes that a list of buffers announces."""
    return [struct.unpack(">BI", each)[1] for each in buffers[1:] if isinstance(each, bytes)]


def test_payload_is_not_copied():
    """The payload's buffers are the caller's own memory."""
    memory = bytearray(20)
    buffers = encode({"v": 1}, [memoryview(memory)[:8], memoryview(memory)[8:]], limits=Limits(frame_bytes=6))
    memory[:] = b"x" * 20
    assert b"".join(each for each in buffers if isinstance(each, memoryview)) == b"x" * 20


def test_frames_are_full_but_the_last():
    """Every frame but the last has the largest size, across the borders of the memory."""
    views = [memoryview(bytes(size)) for size in (5, 0, 9, 3)]
    assert prefixes(encode({}, views, limits=Limits(frame_bytes=8))) == [8, 8, 1]


def test_frames_are_cut_as_the_payload_comes():
    """A payload that comes in parts has the same bytes on the wire as one that is all there."""
    views = [memoryview(bytes([place] * size)) for place, size in enumerate((5, 0, 9, 3, 16))]
    limits = Limits(frame_bytes=8)
    frames = Frames(33, limits=limits)
    parts = [each for view in views for each in frames.cut([view])]
    assert b"".join(parts) == b"".join(encode({}, views, limits=limits)[1:])
    with pytest.raises(ValueError, match="1 bytes more"):
        frames.cut([memoryview(b"x")])


def test_empty_payload_has_no_frames():
    """A message without payload, or with empty memory only, is its header."""
    assert encode({"v": 1}, []) == encode({"v": 1}, [memoryview(b"")]) == [b"\x81\xa1v\x01"]
    assert encoded_size(4, 0) == 4


def test_memory_of_any_item_type_is_sent_as_bytes():
    """Memory of doubles, and of several dimensions, is sent as its bytes."""
    numbers: Any = memoryview(struct.pack("<4d", 1, 2, 3, 4)).cast("d")
    body = b"".join(encode({}, [numbers, memoryview(bytes(6)).cast("B", (2, 3))]))
    assert body == b"\x80\xc6\x00\x00\x00\x26" + numbers.tobytes() + bytes(6)


def test_strided_memory_is_refused():
    """Memory with gaps is refused: its bytes have no order to send."""
    with pytest.raises(ValueError, match="contiguous"):
        encode({}, [memoryview(bytes(8))[::2]])


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ({"v": {1, 2}}, InvalidRequest),
        ({"v": object()}, InvalidRequest),
        ({"v": 1 << 63}, InvalidRequest),
        ({"v": -(1 << 63) - 1}, InvalidRequest),
        ({"v": msgpack.Timestamp(0)}, InvalidRequest),
        ({1: 2}, InvalidRequest),
        ({"a": {"b": {2: 3}}}, InvalidRequest),
        ({"v": "x" * 5000}, LimitExceeded),
        ({"v": [[[[[[[[1]]]]]]]]}, LimitExceeded),
        ({"v": [0] * 262_145}, LimitExceeded),
        ({"v": [2**40] * 200_000}, LimitExceeded),
    ],
    ids=lambda value: f"{value!r:.13}",
)
def test_headers_nobody_would_read_are_not_written(header, error):
    """A header that a reader would refuse is refused before anything is sent, and the error names the side."""
    with pytest.raises(error) as caught:
        encode(header, [], side="client")
    assert caught.value.side == "client"
    assert caught.value.field == "header"


def test_bodies_are_plain_msgpack_streams():
    """Any msgpack reader reads a body: first the header map, then bins that hold the payload."""
    header = {"v": 1, "worker": "w0", "groups": {"0": {"lr": 0.1}}, "segments": [0, 3]}
    payload = bytes(range(256)) * 5
    unpacker = msgpack.Unpacker()
    unpacker.feed(b"".join(encode(header, [memoryview(payload)], limits=Limits(frame_bytes=500))))
    first, *bins = unpacker
    assert first == header
    assert all(type(each) is bytes for each in bins)
    assert b"".join(bins) == payload
    assert list(map(len, bins)) == [500, 500, 280]


@pytest.mark.parametrize("sizes", [[3, 200, 1], [300, 70_000, 5], [0xFF, 0x100, 0xFFFF, 0x10000]])
def test_plain_msgpack_streams_are_bodies(sizes):
    """What any msgpack writer writes, a map and bins of whatever kind and size, is a body."""
    packer = msgpack.Packer()
    payload = bytes(range(251)) * 600
    marks = [0, *accumulate(sizes)]
    body = packer.pack({"v": 1, "segments": None})
    body += b"".join(packer.pack(payload[a:b]) for a, b in pairwise(marks))
    assert read(body, [marks[-1]], pieces=[1000, 3]) == ({"v": 1, "segments": None}, [payload[: marks[-1]]])


def test_more_than_4_gib_is_cut_into_frames():
    """4.5 GiB in 289 pieces of memory, which no frame border meets, become full frames and views of that memory."""
    block = memoryview(bytearray(16 * MIB))
    pieces = [block[:1000], *[block] * 288]
    total = sum(map(len, pieces))
    assert total > 1 << 32
    buffers = encode({"v": 1}, pieces)
    assert prefixes(buffers) == [MAX_FRAME_BYTES] * 288 + [1000]
    assert sum(map(len, buffers)) == encoded_size(len(buffers[0]), total)
    assert all(each.obj is block.obj for each in buffers if isinstance(each, memoryview))


@pytest.mark.promise("Tensors of every dtype arrive bit for bit, also beyond 4 GiB.", area="wire")
def test_more_than_4_gib_lands_where_it_belongs():
    """Of a payload of 4.5 GiB every byte has its place: stamps at both ends of each 16 MiB arrive at their offset."""
    total = 4608 * MIB + 24
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    source, target = (memoryview(mmap.mmap(-1, total, flags=flags)) for _ in range(2))
    stamps = sorted({at for edge in range(0, total, MAX_FRAME_BYTES) for at in (edge, edge + 16, edge - 8) if at >= 0})
    for at in stamps:
        struct.pack_into("<q", source, at, at + 1)

    decoder = Decoder(lambda header: [target])
    for buffer in encode({"v": 1}, [source]):
        rest = memoryview(buffer)
        while rest:
            place = decoder.get_buffer()
            count = min(len(place), len(rest))
            # A fake socket: of each long piece it moves the two ends, so that 4.5 GiB touch few pages.
            ends = [(0, min(128, count)), (max(0, count - 128), count)] if count > 4096 else [(0, count)]
            for a, b in ends:
                place[a:b] = rest[a:b]
            decoder.buffer_updated(count)
            rest = rest[count:]
    decoder.close()
    assert decoder.received == total
    assert [struct.unpack_from("<q", target, at)[0] for at in stamps] == [at + 1 for at in stamps]
