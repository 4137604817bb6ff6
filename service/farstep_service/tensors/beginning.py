"""Which kind of state a session has."""

from __future__ import annotations

import torch

from farstep_service.kernel import KernelSource
from farstep_service.plan import Plan
from farstep_service.rule import Rule
from farstep_service.tensors.closure_state import ClosureState
from farstep_service.tensors.kernel_state import KernelState
from farstep_service.tensors.state import SessionState


def state_of(plan: Plan, *, kernels: KernelSource, device: torch.device) -> SessionState:
    """Return the state of a session that is about to begin.

    Args:
        plan: what the session is.
        kernels: runs update rules.
        device: where parameters and state live.
    """
    if isinstance(plan.rule, Rule):
        return KernelState(plan, plan.rule, kernels=kernels, device=device)
    return ClosureState(plan, device=device)
