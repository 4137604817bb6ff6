"""A step's gradients clipped, by value or by norm; the formulas and their order are in `farstep.protocol.policy`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from farstep_service.store import Gradients
from farstep_service.tensors.policies.workspace import Workspace, pieces

EPSILON = 1e-6
"""What `torch.nn.utils.clip_grad_norm_` adds to the norm before it divides by it."""


def coalesced(gradients: Gradients) -> Gradients:
    """Return gradients of whose sparse ones no row is named twice."""
    found = {}
    for index, (indices, values) in gradients.sparse.items():
        shape = gradients.buffers.layout.segments[index].shape
        whole = torch.sparse_coo_tensor(indices, values, shape, device=values.device, check_invariants=False).coalesce()
        found[index] = (whole.indices(), whole.values())
    return replace(gradients, sparse=found) if found else gradients


def clipped_by_value(gradients: Gradients, value: float, workspace: Workspace) -> Gradients:
    """Return coalesced gradients with no element beyond `value`, as `torch.nn.utils.clip_grad_value_` does."""
    into = workspace.instead_of(gradients)
    for source, target in pieces(into.layout, gradients.dense(), gradients.buffers, into):
        torch.clamp(source, min=-value, max=value, out=target)
    sparse = {index: (rows, its.clamp(min=-value, max=value)) for index, (rows, its) in gradients.sparse.items()}
    return replace(gradients, buffers=into, sparse=sparse, borrowed=False)


def clipped_by_norm(gradients: Gradients, norm: Tensor, largest: float, workspace: Workspace) -> Gradients:
    """Return gradients of a norm whose norm is at most `largest`, as `torch.nn.utils.clip_grads_with_norm_` does.

    Where nothing has to be clipped they are left alone, instead of being multiplied by 1.
    """
    factor = torch.clamp(largest / (norm + EPSILON), max=1.0)
    if factor.item() == 1.0:
        return gradients
    into = workspace.instead_of(gradients)
    for source, target in pieces(into.layout, gradients.dense(), gradients.buffers, into):
        torch.mul(source, factor, out=target)
    sparse = {index: (rows, values * factor) for index, (rows, values) in gradients.sparse.items()}
    return replace(gradients, buffers=into, sparse=sparse, borrowed=False)


def norm_of(gradients: Gradients, norm_type: float) -> Tensor:
    """Return the norm of all gradients as of one vector: the norm of the norms of each, as torch computes it.

    Args:
        gradients: those of a step, coalesced.
        norm_type: the p of the p-norm.
    """
    tensors = [gradients.buffers.segment(index) for index in gradients.dense()]
    tensors += [values for _, values in gradients.sparse.values()]
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device=gradients.buffers.device)
    norms = torch._foreach_norm(tensors, norm_type) if norm_type != math.inf else map(_largest, tensors)
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(list(norms)), norm_type))


def _largest(tensor: Tensor) -> Tensor:
    """Return the largest absolute value, or NaN: the norm of order infinity, for which torch takes 20 times as long."""
    if tensor.is_complex():
        return cast(Tensor, torch.linalg.vector_norm(tensor, math.inf))
    return torch.stack(tensor.aminmax()).abs().amax()
