"""Codecs that encode each element by itself: full precision, which changes nothing, and half precision.

Rounding is to nearest, ties to even, and widening is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from farstep.protocol.codecs.codec import Codec

if TYPE_CHECKING:
    from torch import Tensor


class _Elementwise(Codec):
    """Convert each element to another dtype."""

    block = 1

    def encode_(self, source: Tensor, into: Tensor) -> None:
        into.copy_(source)

    def decode_(self, source: Tensor, into: Tensor) -> None:
        into.copy_(source)


@final
class Full(_Elementwise):
    """Send every tensor unchanged. No header names it: a header without a codec means this one."""

    name = option = "full"
    element = "float32"

    def applies_to(self, dtype: str) -> bool:
        return False

    def encoded_bytes(self, elements: int) -> int:
        return 4 * elements


class _Half(_Elementwise):
    """Send float32 in 16 bits."""

    def encoded_bytes(self, elements: int) -> int:
        return 2 * elements


@final
class BFloat16(_Half):
    """Send the upper half of float32: its range, with 8 bits of precision."""

    name = element = "bfloat16"
    option = "bf16"


@final
class Float16(_Half):
    """Send IEEE half precision: 11 bits of precision, and no number beyond 65504."""

    name = element = "float16"
    option = "fp16"
    limit = 65504.0

    def lost_finite(self, encoded: Tensor, source: Tensor) -> bool:
        # One pass while `encoded` is in the cache: a sum is finite unless a summand is not.
        if encoded.sum(dtype=source.dtype).isfinite():
            return False
        return bool((encoded.isinf().to(source.device) & source.isfinite()).any())
