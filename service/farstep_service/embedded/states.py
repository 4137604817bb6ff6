"""Conversion of state between an optimizer and the session of its own process.

contents_of    by parameter, as `farstep.protocol.fields` has it  ──►  by field, as a session takes it
states_of      and back
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from farstep.protocol.fields import NUMBERS, PRESENT, State, check_shape, mask_of, shapes_of, worth_sending
from farstep_service.plan import Plan
from farstep_service.tensors.contents import Contents


def contents_of(plan: Plan, state: Mapping[int, State | None]) -> Contents:
    """Return new state of some parameters as contents of a session; None stands for no state.

    Raises:
        ValueError: a tensor has another shape than its field.
    """
    layout, fields = plan.layout, plan.rule.kinds
    names = list(fields)
    chosen = worth_sending(fields, state.values())
    contents = Contents(layout, plan.rule, (*chosen, PRESENT), sorted(state), shapes_of(fields, state))
    contents.allocate()
    for place, index in enumerate(contents.indices):
        contents.numbers[PRESENT][place] = mask_of(state[index] or (), names)
    for field in chosen:
        kind = fields[field]
        if kind == "free":
            free = cast(State, state[0])[field]
            contents.free[field].copy_(
                free if isinstance(free, Tensor) else torch.tensor(free, dtype=torch.float64, device="cpu")
            )
            continue
        for place, index in enumerate(contents.indices):
            own = state[index]
            if kind in NUMBERS:
                contents.numbers[field][place] = float(own[field]) if own is not None else 0.0
            elif own is None or field not in own:
                contents.elements[field].segment(index).zero_()
            else:
                value = cast(Tensor, own[field])
                check_shape(field, kind, value.shape, layout.segments[index].shape)
                contents.elements[field].segment(index).copy_(value)
    return contents


def states_of(contents: Contents, plan: Plan, indices: Sequence[int], device: torch.device) -> list[State | None]:
    """Return the state of some parameters, None for one without; tensors are copies on the device.

    Args:
        contents: a copy of every state field, and of `present`, of these parameters.
        plan: of the session.
        indices: the parameters.
        device: where they are.
    """
    fields = plan.rule.kinds
    states: list[State | None] = []
    for place, (index, present) in enumerate(zip(indices, contents.has() or (), strict=True)):
        if present is None:
            states.append(None)
            continue
        own: State = {}
        for field in present:
            if fields[field] in NUMBERS:
                own[field] = float(contents.numbers[field][place])
            elif field in contents.free:
                free = contents.free[field]
                own[field] = float(free) if contents.shapes[field] is None else free.to(device, copy=True)
            else:
                own[field] = contents.elements[field].segment(index).to(device, copy=True)
        states.append(own)
    return states
