"""Every codec that is tested: one row each, with what its numbers are after the wire, by a formula in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from farstep.protocol.codecs import Codec, codec_named, register, unregister
from tests.codecs.blocks import BLOCK, Blocks


@dataclass(frozen=True, slots=True)
class Row:
    """One codec.

    Attributes:
        codec: the codec.
        after: returns a flat float32 tensor as it is after the wire.
        nbytes: bytes that so many elements take.
    """

    codec: Codec
    after: Callable[[Tensor], Tensor]
    nbytes: Callable[[int], int]


def in_blocks(numbers: Tensor) -> Tensor:
    """Return numbers rounded to 1/127 of the largest magnitude of their block of 64."""
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().max(dim=1).values.unsqueeze(1) / 127
    rounded = torch.round(blocks / scale) * scale
    return torch.where(scale > 0, rounded, 0.0).view(-1)[: len(numbers)]


def blocks_bytes(elements: int) -> int:
    return elements + 4 * len(range(0, elements, 64))


TOYS = [
    Row(Blocks("blocks8"), in_blocks, blocks_bytes),
    Row(Blocks("blocks8-whole", whole=True), in_blocks, blocks_bytes),
    Row(Blocks("blocks8-feedback", residual=True), in_blocks, blocks_bytes),
]
ROWS = [
    Row(codec_named("bfloat16"), lambda numbers: numbers.bfloat16().float(), lambda elements: 2 * elements),
    Row(codec_named("float16"), lambda numbers: numbers.half().float(), lambda elements: 2 * elements),
    *TOYS,
]


def names(rows: Sequence[Row]) -> list[str]:
    return [row.codec.name for row in rows]


@contextmanager
def toys() -> Iterator[None]:
    """Make the codecs that are not farstep's known to this process, and to servers in it."""
    for row in TOYS:
        register(row.codec)
    try:
        yield
    finally:
        for row in TOYS:
            unregister(row.codec.name)
