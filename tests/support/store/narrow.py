"""Gradients in 16 bits, and the same ones widened."""

from collections.abc import Sequence
from dataclasses import replace

from farstep.protocol.codecs import codec_named
from farstep_service.layout import Layout
from farstep_service.store import FlatBuffers, Gradients, NarrowBuffers
from tests.store.conftest import noise


def narrowed(layout: Layout, half: str, seed: int) -> tuple[NarrowBuffers, FlatBuffers]:
    """Return noise as it travels in 16 bits, and that same noise in the parameters' dtypes."""
    every, codec = range(len(layout.segments)), codec_named(half)
    memory = FlatBuffers(layout.on_wire(codec)).copy_(noise(layout, seed), every)
    return NarrowBuffers(layout, codec, memory), FlatBuffers(layout).copy_(memory, every)


def both(layout: Layout, half: str, seed: int, present: Sequence[bool] | None = None) -> tuple[Gradients, Gradients]:
    """Return gradients in 16 bits, whose memory takes the answer, and the same ones widened."""
    narrow, wide = narrowed(layout, half, seed)
    return replace(Gradients(narrow, present), copy=narrow), Gradients(wide, present)
