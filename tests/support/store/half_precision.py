"""Gradients in 16 bits, and the same ones widened."""

from collections.abc import Sequence
from dataclasses import replace

from farstep.protocol.codecs import codec_named
from farstep_service.layout import Layout
from farstep_service.store import FlatBuffers, Gradients, HalfPrecisionBuffers
from tests.store.conftest import noise


def half_and_single(layout: Layout, dtype: str, seed: int) -> tuple[HalfPrecisionBuffers, FlatBuffers]:
    """Return noise as it travels in 16 bits, and that same noise in the parameters' dtypes."""
    every, codec = range(len(layout.segments)), codec_named(dtype)
    memory = FlatBuffers(layout.on_wire(codec)).copy_(noise(layout, seed), every)
    return HalfPrecisionBuffers(layout, codec, memory), FlatBuffers(layout).copy_(memory, every)


def both(layout: Layout, dtype: str, seed: int, present: Sequence[bool] | None = None) -> tuple[Gradients, Gradients]:
    """Return gradients in 16 bits, whose memory takes the answer, and the same ones widened."""
    half_precision, wide = half_and_single(layout, dtype, seed)
    return replace(Gradients(half_precision, present), copy=half_precision), Gradients(wide, present)
