"""Making up for stale gradients: what a worker's gradients become before they are reduced.

    weigh_          g  ──►  weight * g                                          of several, each by its staleness
    compensate_     g  ──►  g + strength * g * g * (w_now - w_base)             DC-ASGD (Zheng et al. 2017)

Both change the contribution, which gets memory of its own where it has borrowed some. Numbers are rounded in the
gradient's dtype after each operation, of `compensate_` in the order ((w_now - w_base) * g * g * strength) + g. Real and
imaginary parts of a complex gradient are numbers of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import torch

from farstep.errors import TensorMismatch
from farstep_service.store import Buffers, FlatBuffers, Held
from farstep_service.tensors.contribution import Contribution
from farstep_service.tensors.finite import BLOCK


def weigh_(contribution: Contribution, weight: float) -> None:
    """Multiply gradients, dense and sparse, by a weight."""
    if weight == 1.0:
        return
    own = contribution.own_()
    for first, last in contribution.layout.spans(contribution.dense):
        span = own.span(first, last)
        if span is not None:
            span.mul_(weight)
    for index in contribution.sparse:
        indices, values = contribution.widened(index)
        contribution.sparse[index] = (indices, values * weight)


def compensate_(contribution: Contribution, now: Buffers, base: Buffers, strength: float) -> None:
    """Correct dense gradients by how far the parameters have moved since they were computed."""
    own, layout = contribution.own_(), contribution.layout
    for index in contribution.dense:
        gradient, here, there = own.span(index, index + 1), now.span(index, index + 1), base.span(index, index + 1)
        if gradient is None or here is None or there is None:
            raise ValueError(f"segment {layout.segments[index].name!r} is not in one piece")
        for g, w, b in zip(*(torch.split(each, BLOCK) for each in (gradient, here, there)), strict=True):
            moved = (w - b).to(g.device)
            g.add_(moved.mul_(g).mul_(g).mul_(strength))


def check_dense(contribution: Contribution, worker: str) -> None:
    """Refuse sparse gradients where delays are compensated.

    Raises:
        TensorMismatch: naming the first one.
    """
    for index in contribution.sparse:
        name = contribution.layout.segments[index].name
        raise TensorMismatch(
            f"The gradient of {name!r} from worker {worker!r} is sparse, and delay_compensation takes dense ones.",
            remedy="Use staleness_scaling, or dense gradients.",
            field=name,
        )


@final
@dataclass(frozen=True, slots=True)
class Kept:
    """One version of the parameters in memory of its own, as `Held` is one in the memory of a store."""

    version: int
    buffers: FlatBuffers

    def release(self) -> None:
        """Nothing is held: the memory goes with this object."""


@final
class Bases:
    """The version of the parameters that each worker last received, kept for as long as it may push from there."""

    def __init__(self, kept: Mapping[str, Kept] = MappingProxyType({})) -> None:
        self._held: dict[str, Held | Kept] = {**kept}

    def keep(self, worker: str, held: Held) -> None:
        """Keep a version as what a worker has now, in the place of the one before."""
        before = self._held.get(worker)
        self._held[worker] = held
        if before is not None:
            before.release()

    def forget(self, worker: str) -> None:
        """Let what a worker has go."""
        held = self._held.pop(worker, None)
        if held is not None:
            held.release()

    def of(self, worker: str, version: int) -> Held | Kept | None:
        """Return what a worker has if it is that version, None if that is not kept."""
        held = self._held.get(worker)
        return held if held is not None and held.version == version else None

    def cloned(self) -> dict[str, Kept]:
        """Return copies of all versions that are kept, by worker."""
        return {
            worker: Kept(held.version, FlatBuffers(held.buffers.layout, held.buffers.device).copy_(held.buffers))
            for worker, held in self._held.items()
        }
