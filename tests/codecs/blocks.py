"""A codec that farstep does not have: int8 in blocks of 64, each behind a float32 scale, so its size is
not that of its elements.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from farstep.protocol.codecs import Codec

BLOCK, SCALE_BYTES = 64, 4


@final
class Blocks(Codec):
    """Send blocks as `scale, round(x / scale), ...`, where the scale is the largest magnitude of the block / 127.

    Args:
        residual: with error feedback.
        whole: a tensor is encoded whole, as if blocks could not be told apart.
    """

    def __init__(self, name: str, *, residual: bool = False, whole: bool = False) -> None:
        self.name = self.option = name
        self.residual = residual
        self.block = None if whole else BLOCK

    def encoded_bytes(self, elements: int) -> int:
        return elements + SCALE_BYTES * -(-elements // BLOCK)

    def encode_(self, source: Tensor, into: Tensor) -> None:
        for numbers, memory in _blocks(source, into):
            scale = numbers.abs().amax(1, keepdim=True) / 127
            steps = torch.where(scale > 0, numbers / scale, 0.0).nan_to_num(0.0)
            memory[:, :SCALE_BYTES] = scale.view(torch.uint8)
            memory[:, SCALE_BYTES:] = steps.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)

    def decode_(self, source: Tensor, into: Tensor) -> None:
        for numbers, memory in _blocks(into, source):
            scale = memory[:, :SCALE_BYTES].clone(memory_format=torch.contiguous_format).view(torch.float32)
            numbers.copy_(memory[:, SCALE_BYTES:].view(torch.int8).to(torch.float32) * scale)


def _blocks(numbers: Tensor, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the full blocks as rows of two matrices, and a shorter one behind them."""
    full = numbers.numel() // BLOCK
    at, size = full * BLOCK, full * (BLOCK + SCALE_BYTES)
    pairs = [(numbers[:at].view(full, BLOCK), memory[:size].view(full, BLOCK + SCALE_BYTES))]
    if at < numbers.numel():
        pairs.append((numbers[at:].view(1, -1), memory[size:].view(1, -1)))
    return pairs if full else pairs[1:]
