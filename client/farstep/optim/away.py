"""Parameters that temporarily have another shape or dtype, such as offloaded ones, while the others step.

torch steps on what has a gradient, so a parameter without one may be anything in between. A session holds it in its
first form. Until it is back, a stand-in of that form takes its place: nothing is read from the parameter, and nothing
is copied into it.

    back as it was            it gets what other workers made of it meanwhile
    back with other values    it was edited here, and is sent like any other edit
    a gradient comes          its form is the new one, and the session's is not: see `InSession._move`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from farstep.tensors import same_bits

ShapeDtype = tuple[torch.Size, torch.dtype]
StandIn = Callable[[int], Tensor | None]


def shape_dtype(p: Tensor) -> ShapeDtype:
    """Return the form in which a session holds a parameter."""
    return p.shape, p.dtype


@final
@dataclass(frozen=True, slots=True)
class Away:
    """The parameters of a session, including those that are away.

    Attributes:
        own: all parameters, in the session's order.
        forms: their shapes and dtypes in the session.
        places: the stand-in of each parameter that is away, by index, and the values that it began with.
    """

    own: Sequence[Tensor]
    forms: Sequence[ShapeDtype]
    places: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def parameters(self) -> list[Tensor]:
        """Return the tensors that the session works with."""
        return [self.places[index][0] if index in self.places else p for index, p in enumerate(self.own)]

    @property
    def is_still_so(self) -> bool:
        """Return whether those that were away still are, without a gradient."""
        return all(_is_away(self.own[index], self.forms[index]) for index in self.places)

    def now(self, stand_in: StandIn, *, lone: bool) -> Away | None:
        """Return the same with those that are away now; None if none is, or one has a gradient or no stand-in.

        Args:
            stand_in: returns the stand-in of a parameter; see `Link.stand_in`.
            lone: no other worker is in the session.
        """
        places = {}
        for index, (p, form) in enumerate(zip(self.own, self.forms, strict=True)):
            if shape_dtype(p) == form:
                continue
            found = self.places.get(index)
            if found is None and _is_away(p, form) and (fresh := stand_in(index)) is not None:
                found = fresh, fresh if lone else fresh.clone()
            if found is None or p.grad is not None:
                return None
            places[index] = found
        return Away(self.own, self.forms, places) if places else None

    def settle_(self, still: Away | None = None) -> None:
        """Update parameters that are back to what others made of them meanwhile, unless they were changed here.

        Args:
            still: those that are away now; None for none.
        """
        for index, (now, before) in self.places.items():
            p = self.own[index]
            is_back = still is None or index not in still.places
            if is_back and now is not before and same_bits(p.detach().cpu(), before):
                p.detach().copy_(now)


def _is_away(p: Tensor, form: ShapeDtype) -> bool:
    return shape_dtype(p) != form and p.grad is None
