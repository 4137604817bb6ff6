"""The gradients of one step: dense ones in buffers, sparse ones as indices and values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.protocol.memory import TORCH_DTYPES
from farstep_service.layout import Segment
from farstep_service.store.buffers import Buffers


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of a step.

    Attributes:
        buffers: dense gradients, in the layout of the parameters; undefined where not `present`.
        present: which segments have a dense gradient; None for all but the sparse ones.
        sparse: by segment, int64 indices `(sparse dims, nnz)` and values `(nnz, *dense shape)`; duplicates are summed.
        borrowed: the buffers are borrowed, and read only.
        copy: a second target of the new parameters, if that needs no separate pass; it may be `buffers`.
    """

    buffers: Buffers
    present: Sequence[bool] | None = None
    sparse: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    borrowed: bool = False
    copy: Buffers | None = None

    def dense(self) -> list[int]:
        """Return the segments with a dense gradient, ascending."""
        count = len(self.buffers.layout.segments)
        if self.present is None and not self.sparse:
            return list(range(count))
        if self.present is not None and len(self.present) != count:
            raise TensorMismatch(
                f"`present` speaks of {len(self.present)} segments; there are {count}.", field="present"
            )
        present = self.present or [True] * count
        return [index for index in range(count) if present[index] and index not in self.sparse]


@dataclass(frozen=True, slots=True)
class Rows:
    """A sparse gradient with distinct rows.

    Attributes:
        segment: the parameter's number.
        shape: the parameter as a matrix of rows: all sparse dimensions in one, then the dense ones.
        rows: which rows, int64, each once.
        values: their gradients.
    """

    segment: int
    shape: tuple[int, ...]
    rows: Tensor
    values: Tensor

    def dense(self) -> Tensor:
        """Return the dense gradient, as a matrix of rows."""
        whole = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        return whole.index_copy_(0, self.rows, self.values)


def coalesce(index: int, segment: Segment, indices: Tensor, values: Tensor, device: torch.device) -> Rows:
    """Sum the duplicates of a sparse gradient, in torch's own order.

    Raises:
        TensorMismatch: the shapes, dtypes or indices are not those of a gradient of this segment.
    """
    dims = indices.shape[0] if indices.dim() == 2 else 0
    dense = segment.shape[dims:]
    if (
        not 1 <= dims <= len(segment.shape)
        or indices.dtype is not torch.int64
        or values.dtype is not TORCH_DTYPES[segment.dtype]
        or tuple(values.shape) != (indices.shape[1], *dense)
    ):
        raise TensorMismatch(
            f"The sparse gradient of {segment.name!r} has indices {indices.dtype} {list(indices.shape)} and values "
            f"{values.dtype} {list(values.shape)}; the parameter is {segment.dtype} {list(segment.shape)}.",
            field=segment.name,
        )
    bounds = torch.tensor(segment.shape[:dims], dtype=torch.int64, device=indices.device).unsqueeze(1)
    if bool(((indices < 0) | (indices >= bounds)).any()):
        raise TensorMismatch(
            f"The sparse gradient of {segment.name!r} names rows outside {list(segment.shape)}.", field=segment.name
        )
    whole = torch.sparse_coo_tensor(indices, values, segment.shape, device=device, check_invariants=False).coalesce()
    rows = torch.zeros(whole._nnz(), dtype=torch.int64, device=device)
    for dim in range(dims):
        rows.mul_(segment.shape[dim]).add_(whole.indices()[dim])
    return Rows(index, (math.prod(segment.shape[:dims]), *dense), rows, whole.values())
