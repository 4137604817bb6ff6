"""Which of an optimizer's parameters its session holds: those that a step of torch could change.

    held        dense, of floating point or complex numbers, in memory of its own
    left out    what torch takes as long as it has no gradient: integers, float8, quantized, sparse, meta, lazy and
                expanded tensors; and what shares memory with another parameter and requires no gradient
    refused     what requires gradients, and no step could change

Two that share memory and both require gradients are held, and the first step with a gradient for one of them is
refused: torch steps on them one after the other, each from the result of the one before; a session steps on all at
once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils import _python_dispatch

from farstep.errors import TensorMismatch
from farstep.link import Parameter
from farstep.optim.names import plain_names
from farstep.protocol.memory import wire_dtype
from farstep.tensors import overlapping, shares_with_itself

SHARED = "shares memory with {}, which is held in its place"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The choice of parameters among those of some groups.

    Attributes:
        described: what the session holds, in order.
        parameters: the same, as tensors.
        places: where they are among all parameters.
        left: the names of those that are left out, and why, by their place.
        ties: pairs of names that share memory.
        tied: the same, as tensors.
        left_out: those that are left out, as tensors.
        kinds: what decided that a parameter is left out, by its place.
    """

    described: list[Parameter]
    parameters: list[Tensor]
    places: list[int]
    left: dict[int, tuple[str, str]]
    ties: list[tuple[str, str]]
    tied: list[tuple[Tensor, Tensor]]
    left_out: list[Tensor]
    kinds: dict[int, tuple[object, ...]]

    def leaves(self, every: Sequence[Tensor]) -> bool:
        """Return whether the parameters that are left out would be left out again."""
        return all(_kind_of(every[place]) == self.kinds[place] for place in self.left)

    def check_step(self, every: Sequence[Tensor]) -> None:
        """Refuse a step with gradients that a session cannot apply as torch would.

        Raises:
            TensorMismatch: naming the parameters.
        """
        for place, (name, why) in self.left.items():
            if every[place].grad is not None:
                raise TensorMismatch(
                    f"Parameter {name!r} {why}, and has a gradient.",
                    remedy="Give each tensor once, and leave parameters out that no step can change.",
                    field=name,
                    side="client",
                )
        for (one, other), (p, q) in zip(self.ties, self.tied, strict=True):
            if p.grad is not None or q.grad is not None:
                raise TensorMismatch(
                    f"Parameters {one!r} and {other!r} share memory. torch steps on them one after the other, a "
                    "session on all parameters from where they were.",
                    remedy="Tie them as one Parameter (b.weight = a.weight) and make the optimizer after that, or give "
                    "it one of them.",
                    field=other,
                    side="client",
                )


def chosen_of(groups: Sequence[Mapping[str, Any]], held: Collection[Tensor] = ()) -> Chosen:
    """Return which parameters of all groups a session holds, named by torch's `param_names` where there are names.

    The names are those of the plain model, so that a compiled or wrapped one shares its session.

    Args:
        groups: an optimizer's param groups.
        held: parameters that the session has already; they are not left out for sharing memory.

    Raises:
        TensorMismatch: a parameter occurs twice; or it requires gradients, and no step could change it.
    """
    every = [p for group in groups for p in group["params"]]
    if len(every) != len(set(every)):
        raise TensorMismatch(
            "A parameter is in a group more than once; torch warns that this will be an error.",
            remedy="Give each parameter once; the gradient of one that a module has under two names is in it whole.",
            side="client",
        )
    given = [name for group in groups for name in group.get("param_names") or ()]
    plain = dict(zip(given, plain_names(given), strict=True))
    named = [
        (index, plain.get(name, name))
        for index, group in enumerate(groups)
        for name in group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
    ]
    named = _unique(named)
    left = {}
    for place, (p, (_, name)) in enumerate(zip(every, named, strict=True)):
        if why := unsteppable(p):
            if p.requires_grad and not is_lazy(p) and p.device.type != "meta":
                raise TensorMismatch(
                    f"Parameter {name!r} {why}.",
                    remedy="Give whole tensors with elements of their own: a clone() of an expanded one, and a sync "
                    "session in place of sharding.",
                    field=name,
                    side="client",
                )
            left[place] = (name, why)
    known = set(held)
    while True:
        places = [place for place in range(len(every)) if place not in left]
        ties = [(places[one], places[other]) for one, other in overlapping([every[place] for place in places])]
        spare = {
            place: instead
            for one, other in ties
            for place, instead in ((one, other), (other, one))
            if not every[place].requires_grad and every[place] not in known
        }
        if not spare:
            break
        place = max(spare)
        left[place] = (named[place][1], SHARED.format(repr(named[spare[place]][1])))
    return Chosen(
        [_described(every[place], *named[place]) for place in places],
        [every[place] for place in places],
        places,
        left,
        [(named[one][1], named[other][1]) for one, other in ties],
        [(every[one], every[other]) for one, other in ties],
        [every[place] for place in left],
        {place: _kind_of(every[place]) for place in left},
    )


def _unique(named: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return groups and names of parameters, with a number behind a name that repeats, as with two models."""
    found: set[str] = set()
    apart = []
    for group, name in named:
        unique, count = name, 1
        while unique in found:
            count += 1
            unique = f"{name}#{count}"
        found.add(unique)
        apart.append((group, unique))
    return apart


def _described(p: Tensor, group: int, name: str) -> Parameter:
    return Parameter(name, tuple(p.shape), str(p.dtype).removeprefix("torch."), group)


def _kind_of(p: Tensor) -> tuple[object, ...]:
    """Return the facts that decide whether a parameter is left out."""
    if why := unsteppable(p):
        return (why,)
    return p.requires_grad, p.data_ptr(), p.shape, p.dtype


def unsteppable(p: Tensor) -> str:
    """Return why no step could change a parameter, "" if one could."""
    if is_lazy(p):
        return "has no shape yet"
    if bool(_python_dispatch.is_traceable_wrapper_subclass(p)):
        return f"is a {type(p).__name__}, whose elements are other tensors'"
    if p.device.type == "meta":
        return "is on the meta device, where it has no values"
    if p.layout is not torch.strided:
        return f"is sparse ({p.layout})"
    if wire_dtype(p.dtype) is None or not (p.is_floating_point() or p.is_complex()):
        return f"is {p.dtype}, on which no step is defined"
    if shares_with_itself(p):
        return "has elements that share memory, as those of an expanded tensor do"
    return ""
