"""torch's own words for gradients that an optimizer does not take: its class is asked, on tensors of one element.

A session refuses them too, as a server has to; who catches torch's exceptions gets torch's, the session's as its cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from farstep.optim.options import arguments


def refusal(
    twin: type[torch.optim.Optimizer], defaults: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]
) -> RuntimeError | None:
    """Return what torch's class raises for gradients like those of these groups, None where it takes them all."""
    for group in groups:
        probes = {_kind(p): p for p in group["params"] if p.grad is not None}
        for p in probes.values():
            asked = twin([_probe(p)], **arguments(twin, defaults))
            asked.param_groups[0].update({key: group[key] for key in defaults if key in group})
            try:
                asked.step()
            except RuntimeError as error:
                return error
            except TypeError:
                return None  # an option that is no number, which the session says better
    return None


def _kind(p: Tensor) -> tuple[object, ...]:
    return p.dtype, p.dim(), p.grad is not None and p.grad.layout


def _probe(p: Tensor) -> Tensor:
    """Return a parameter of one element with a gradient such as this one has."""
    probe = torch.zeros([1] * p.dim(), dtype=p.dtype).requires_grad_()
    probe.grad = torch.zeros_like(probe)
    if p.grad is not None and p.grad.is_sparse:
        probe.grad = probe.grad.to_sparse(p.grad.sparse_dim())
    return probe
