"""The reference kernel: torch's own eager operations, block by block.

It needs no compiler and gives the bits of `torch.optim` with `foreach=False` on the same device, in float32 and float64
whatever the cuts between blocks. A block is small enough to stay in a core's cache over all the operations of a rule,
which makes it up to twice as fast as whole tensors, and it bounds the memory for temporaries.

The new values of a block are computed before they are written, so a block is all or nothing. A rule for whole tensors
has one block per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from farstep_service.kernels.kernel import Call, Kernel, Progress, Write, cut
from farstep_service.optimizers.rule import AnyRule, ElementwiseRule, KernelSignature

BLOCK = 2**17
"""Elements of a block, an even number of them, for pairs. 64k to 256k are equally fast; smaller ones cost more calls,
larger ones leave the cache."""
GPU_BLOCK = 2**25
"""Elements of a block on a GPU, where each operation is a launch and blocks only bound the memory of temporaries."""


@final
class ReferenceKernel(Kernel):
    """Run a rule eagerly.

    Args:
        rule: the rule.
        block: elements of a block on a CPU.
        gpu_block: elements of a block elsewhere.
    """

    name = "reference"

    def __init__(self, rule: AnyRule, block: int = BLOCK, gpu_block: int = GPU_BLOCK) -> None:
        self._rule = rule
        self._block = block
        self._gpu_block = gpu_block

    def takes(self, form: KernelSignature) -> bool:
        """Return True: a block is in the cache while it is widened and copied."""
        return True

    def execute(self, calls: Sequence[Call], progress: Progress) -> None:
        """Execute calls from `progress` on, a block at a time."""
        progress.resume()
        while progress.at.call < len(calls):
            index, start = progress.at.call, progress.at.element
            call = calls[index]
            length = call.p.numel()
            stop = length
            if isinstance(self._rule, ElementwiseRule):
                stop = min(start + (self._block if call.p.is_cpu else self._gpu_block), length)
            writes = self._block_of(call if stop - start == length else cut(call, start, stop))
            if stop < length:
                progress.commit(writes, call=index, element=stop)
            else:
                progress.commit(writes, call=index + 1)

    def _block_of(self, call: Call) -> list[Write]:
        p, g, state = call.p, call.g.to(call.p.dtype), call.state
        if call.pairs:
            numbers = {name: _numbers(field) for name, field in state.items()}
            p, state = self._rule.update(_numbers(p), _numbers(g), numbers, call.scalars)
            p, state = _pairs(p), {name: _pairs(values) for name, values in state.items()}
        else:
            p, state = self._rule.update(p, g, state, call.scalars)
        writes = [Write(call.out, p), *(Write(call.state[name], values) for name, values in state.items())]
        return writes if call.copy is None else [*writes, Write(call.copy, p)]


def _numbers(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.view(-1, 2))


def _pairs(numbers: Tensor) -> Tensor:
    return torch.view_as_real(numbers).view(-1)
