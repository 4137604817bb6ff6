"""What was encoded is decoded, whatever it is and however it travels."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farstep.errors import InvalidRequest
from farstep.protocol import SEGMENT_DTYPES, Decoder, Limits, encode, encoded_size, from_ranges, to_ranges
from farstep.protocol.memory import TORCH_DTYPES, tensor_memory
from tests.support.wire.driving import drive, read

dtypes = st.sampled_from([*SEGMENT_DTYPES, "int64"])
shapes: st.SearchStrategy[list[int]] = st.one_of(
    st.just([]),
    st.lists(st.integers(0, 5), max_size=4),
    st.lists(st.sampled_from([1, 1, 1, 2]), min_size=16, max_size=16).filter(lambda shape: math.prod(shape) <= 256),
)
ways = st.lists(st.sampled_from(["feed", "buffer"]), min_size=1, max_size=5)
pieces = st.one_of(st.just([1]), st.lists(st.integers(1, 400), min_size=1, max_size=6), st.just([1 << 20]))
frames = st.sampled_from([1, 2, 3, 7, 64, 255, 256, 1 << 24])

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.binary(max_size=40),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=6)
    ),
    max_leaves=20,
)
headers = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=20), values, max_size=20).filter(
    lambda header: depth(header) <= 8
)


def depth(value: object) -> int:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max(map(depth, inner), default=0)
    return 0


@st.composite
def tensors(draw):
    """Return a tensor whose bytes are anything, NaNs of every kind included."""
    dtype, shape = TORCH_DTYPES[draw(dtypes)], draw(shapes)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    data = bytearray(draw(st.binary(min_size=size, max_size=size)))
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.promise("Tensors of every dtype arrive bit for bit, also beyond 4 GiB.", area="wire")
@settings(max_examples=300)
@given(st.lists(tensors(), max_size=12), frames, pieces, ways)
def test_tensors_come_back_bit_for_bit(sent, frame_bytes, pieces, ways):
    """Tensors of every dtype and shape arrive in other tensors bit for bit, cut into frames and pieces anywhere."""
    limits = Limits(frame_bytes=frame_bytes)
    body = b"".join(encode({"v": 1}, list(map(tensor_memory, sent)), limits=limits))
    came = [torch.empty_like(each) for each in sent]
    decoder = Decoder(lambda header: list(map(tensor_memory, came)), limits=limits)
    drive(decoder, body, pieces=pieces, ways=ways)
    decoder.close()
    assert decoder.done
    assert list(map(bytes, map(tensor_memory, came))) == list(map(bytes, map(tensor_memory, sent)))


@given(headers, pieces, ways)
def test_headers_come_back_equal(header, pieces, ways):
    """A header of any plain values within the limits comes back equal."""
    body = b"".join(encode(header, []))
    assert read(body, [], pieces=pieces, ways=ways) == (header, [])


@given(st.binary(max_size=300), st.lists(st.integers(0, 50), max_size=10), frames, pieces, ways)
def test_reader_and_writer_cut_memory_independently(payload, cuts, frame_bytes, pieces, ways):
    """The pieces of memory on one side, the frames and the pieces on the other side need not agree."""
    limits = Limits(frame_bytes=frame_bytes)
    marks = [0, *sorted(min(cut, len(payload)) for cut in cuts), len(payload)]
    views = [memoryview(payload)[a:b] for a, b in pairwise(marks)]
    body = b"".join(encode({}, views, limits=limits))
    sizes = [len(payload) - len(payload) // 3, 0, len(payload) // 3]
    _, came = read(body, sizes, pieces=pieces, ways=ways, limits=limits)
    assert b"".join(came) == payload


@given(st.lists(st.integers(0, 3000), max_size=30))
def test_sizes_are_known_beforehand(sizes):
    """The size of a message follows from the size of its header and its payload."""
    buffers = encode({"v": 1}, [memoryview(bytes(size)) for size in sizes])
    assert sum(map(len, buffers)) == encoded_size(len(buffers[0]), sum(sizes))


@given(st.sets(st.integers(0, 60)), st.integers(0, 5))
def test_ranges_come_back_equal(indices, more):
    """Indices come back from their ranges, which neither touch nor overlap."""
    ranges = to_ranges(sorted(indices))
    assert from_ranges(ranges, max(indices, default=-1) + 1 + more) == sorted(indices)
    assert ranges == sorted(set(ranges))


def refusal_of(body: bytes, **how) -> InvalidRequest | None:
    """Return the error that reading raised, or None if there was a message."""
    try:
        read(body, [8], **how)
    except InvalidRequest as error:
        return error
    return None


@pytest.mark.promise(
    "Any bytes at all are read or refused with a documented error, and refusing bombs costs little time and memory.",
    area="bad input",
)
@settings(max_examples=500)
@given(st.binary(max_size=200), pieces, ways)
def test_any_bytes_are_read_or_refused(body, pieces, ways):
    """No bytes at all make the decoder raise anything but the errors it documents."""
    refusal = refusal_of(body, pieces=pieces, ways=ways)
    if refusal is not None:
        assert refusal.detail.endswith(".")
        assert refusal.field in ("header", "payload")


@settings(max_examples=300)
@given(st.data(), pieces)
def test_damaged_messages_are_read_or_refused(data, pieces):
    """A message with some bytes changed, lost or doubled is refused with a documented error, or is another message."""
    header = {"v": 1, "worker": "w0", "segments": [0, 3], "groups": {"0": {"lr": 0.5}}}
    body = bytearray(b"".join(encode(header, [memoryview(bytes(8))])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        body[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    refusal = refusal_of(bytes(body), pieces=pieces)
    if refusal is not None:
        assert refusal.detail.endswith(".")
