"""Gradients on their way out: small neighbours are joined in memory of ours, large ones are sent from where they lie.

A view of a tensor's memory takes as long as a copy of some ten thousand of its bytes, and every buffer of a message
costs again on its way to the socket. So a step of many small gradients is one copy, and one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farstep.staging import outgoing
from farstep.wire.memory import tensor_memory

SMALL_BYTES = 32 * 1024
"""Up to here a gradient is copied."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbours that are sent as one buffer, None for a large one that is sent as it is."""

    first: int
    last: int
    staged: list[Tensor]
    memory: memoryview | None


@final
class Departures:
    """Memory for the small gradients of one optimizer.

    Args:
        parameters: whose gradients they are, in the session's order.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._dtypes = [p.dtype for p in parameters]
        self._runs: list[_Run] = []
        first = 0
        for last in range(1, len(parameters) + 1):
            if last == len(parameters) or not _joined(parameters[first], parameters[last]):
                self._runs.append(_run(parameters, first, last))
                first = last

    def payload(self, gradients: Sequence[Tensor | None]) -> list[memoryview] | None:
        """Return the payload of gradients that are all there and dense, None for others.

        It is overwritten by the next one.
        """
        there = [each for each in gradients if each is not None and each.layout is torch.strided]
        if [each.dtype for each in there] != self._dtypes:
            return None
        payload = []
        for run in self._runs:
            if run.memory is None:
                payload.append(outgoing(there[run.first]))
            else:
                torch._foreach_copy_(run.staged, there[run.first : run.last])
                payload.append(run.memory)
        return payload


def _joined(before: Tensor, after: Tensor) -> bool:
    return before.dtype == after.dtype and max(before.nbytes, after.nbytes) <= SMALL_BYTES


def _run(parameters: Sequence[Tensor], first: int, last: int) -> _Run:
    members = parameters[first:last]
    if last - first == 1:
        return _Run(first, last, [], None)
    flat = torch.empty(sum(p.numel() for p in members), dtype=members[0].dtype)
    pieces = torch.split(flat, [p.numel() for p in members])
    return _Run(
        first, last, [piece.view(p.shape) for piece, p in zip(pieces, members, strict=True)], tensor_memory(flat)
    )
