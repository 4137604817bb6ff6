"""What every codec keeps to: exact sizes, bytes that depend on the numbers alone, and decoding that never fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farstep.errors import InvalidOption, InvalidRequest
from farstep.protocol.codecs import FULL, Codec, Wire, check_codec, codec_named, codecs, register, unregister
from farstep.protocol.memory import TORCH_DTYPES
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.store import FlatBuffers, decode_, encode_
from tests.codecs.table import ROWS, TOYS, Row, names, toys

SIZES = [0, 1, 63, 64, 65, 1000]
every_codec = pytest.mark.parametrize("row", ROWS, ids=names(ROWS))


def memory_for(codec: Codec, elements: int) -> Tensor:
    nbytes = codec.encoded_bytes(elements)
    if codec.element is None:
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)
    dtype = TORCH_DTYPES[codec.element]
    return torch.full((nbytes // dtype.itemsize,), 7, dtype=dtype)


def encoded(codec: Codec, numbers: Tensor) -> Tensor:
    memory = memory_for(codec, numbers.numel())
    codec.encode_(numbers, memory)
    return memory


def decoded(codec: Codec, memory: Tensor, elements: int) -> Tensor:
    numbers = torch.full((elements,), 7.0)
    codec.decode_(memory, numbers)
    return numbers


def noise(elements: int, seed: int = 0) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed))


def test_every_codec_has_a_row() -> None:
    """A codec that is added without a row in the table is not tested, so it is refused here."""
    assert {codec.name for codec in codecs()} <= set(names(ROWS))


@every_codec
@pytest.mark.parametrize("elements", SIZES)
def test_a_codec_does_what_its_formula_says(row: Row, elements: int) -> None:
    """Its size is exact, its numbers are those of the formula, and the same numbers give the same bytes."""
    numbers = noise(elements)
    memory = encoded(row.codec, numbers)
    assert memory.nbytes == row.codec.encoded_bytes(elements) == row.nbytes(elements)
    assert torch.equal(decoded(row.codec, memory, elements), row.after(numbers))
    assert torch.equal(encoded(row.codec, numbers.clone()), memory)


@every_codec
def test_zeros_and_equal_numbers_are_kept(row: Row) -> None:
    """A gradient of zeros arrives as zeros, and one of equal small powers of two as itself."""
    for value in (0.0, 127.0, -0.5 * 127):
        numbers = torch.full((130,), value)
        assert torch.equal(decoded(row.codec, encoded(row.codec, numbers), 130), row.after(numbers))
        assert torch.equal(row.after(numbers), numbers)


@every_codec
def test_what_is_not_finite_stays_so(row: Row) -> None:
    """A server that refuses NaN and Inf finds them after decoding."""
    for value in (float("nan"), float("inf"), float("-inf")):
        numbers = noise(200)
        numbers[150] = value
        assert not decoded(row.codec, encoded(row.codec, numbers), 200).isfinite().all()


BLOCKWISE = [row for row in ROWS if row.codec.block is not None]


@pytest.mark.parametrize("row", BLOCKWISE, ids=names(BLOCKWISE))
def test_pieces_of_whole_blocks_are_the_whole(row: Row) -> None:
    """A codec with a block can be cut there: large gradients are encoded while they are sent."""
    codec, numbers = row.codec, noise(1000)
    assert codec.block is not None
    step = 3 * codec.block
    pieces = [encoded(codec, numbers[first : first + step]) for first in range(0, 1000, step)]
    assert torch.equal(torch.cat(pieces), encoded(codec, numbers))


@every_codec
def test_any_bytes_are_decoded(row: Row) -> None:
    """They come from another machine: whatever they are, they are numbers, and no error."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        memory = memory_for(row.codec, 130)
        raw = torch.randint(0, 256, (memory.nbytes,), generator=generator, dtype=torch.uint8)
        assert decoded(row.codec, raw.view(memory.dtype), 130).numel() == 130


@every_codec
def test_a_layout_knows_what_travels(row: Row) -> None:
    """Only float32 is encoded, the other segments lie between as they are, and sizes are exact."""
    specs = [("w", (30, 5), "float32"), ("h", (7,), "bfloat16"), ("z", (3,), "complex64"), ("b", (), "float32")]
    layout = Layout.build(SegmentSpec(name, (*shape, 1), dtype) for name, shape, dtype in specs)
    wire = layout.on_wire(row.codec)
    assert [each.nbytes for each in wire.segments] == [row.nbytes(150), 14, 24, row.nbytes(1)]
    assert wire.nbytes == sum(each.nbytes for each in wire.segments)
    assert layout.on_wire(row.codec) is wire
    assert layout.on_wire(FULL) is layout
    whole = FlatBuffers(layout)
    for index, flat in enumerate(whole.flat.values()):
        flat.copy_(noise(flat.numel(), index))
    every = range(len(specs))
    there, back = FlatBuffers(wire, zero=False), FlatBuffers(layout)
    encode_(there, whole, row.codec, every)
    if row.codec.element is None:
        decode_(back, there, row.codec, every)
    else:
        back.copy_(there, every)
    for index, (_, _, dtype) in enumerate(specs):
        before = whole.segment(index)
        expected = row.after(before.reshape(-1)).view(before.shape) if dtype == "float32" else before
        assert torch.equal(back.segment(index), expected)


def test_a_registered_codec_is_known_by_name_and_option() -> None:
    """In headers and as `wire=`, until it is removed; refusals list it."""
    before = [codec.name for codec in codecs()]
    with pytest.raises(InvalidOption, match=r"There are bf16\b.*\bfp16\b"):
        Wire.of("blocks8")
    with pytest.raises(InvalidRequest, match=r"there are bfloat16\b.*\bfloat16\b"):
        check_codec("wire_gradients", "blocks8")
    with toys():
        assert Wire.of("blocks8").codecs == (TOYS[0].codec, TOYS[0].codec)
        assert Wire(parameters="blocks8").codecs == (FULL, TOYS[0].codec)
        assert check_codec("wire_gradients", "blocks8") == "blocks8"
        assert codec_named("blocks8") is TOYS[0].codec
        with pytest.raises(InvalidRequest, match=f"{', '.join([*before, *names(TOYS)[:-1]])} and {names(TOYS)[-1]}"):
            check_codec("wire_gradients", "other")
    assert [codec.name for codec in codecs()] == before
    with pytest.raises(InvalidOption, match="There are bf16"):
        Wire.of("blocks8")


@pytest.mark.parametrize("row", ROWS[:2], ids=names(ROWS[:2]))
def test_a_name_is_taken_once(row: Row) -> None:
    """Two codecs of one name would be two meanings of the same bytes."""
    with pytest.raises(ValueError, match="already"):
        register(row.codec)
    with pytest.raises(KeyError):
        unregister("full")
