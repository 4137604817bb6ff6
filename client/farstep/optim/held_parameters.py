"""The parameters that a session holds: a record that each step compares the optimizer's groups with.

Equal are the same tensors in the same memory, of the same size and dtype. Two differences are followed: parameters that
are away for a while (`farstep.optim.away`), and parameters that were replaced by others of the same form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, final

from torch import Tensor

from farstep.errors import TensorMismatch
from farstep.optim.away import Away, StandIn, shape_dtype
from farstep.optim.chosen import Chosen, chosen_of


@final
class HeldParameters:
    """A record of a session's parameters; one that changes is replaced.

    Args:
        groups: the parameters of each of the optimizer's groups.
        chosen: which of them the session holds.
        parameters: the tensors that the session works with: those chosen, or what stands in for them.
        away: the parameters that are away, None for none.
        stand_in: see `Link.stand_in`; None for an optimizer whose parameters may not be away.
        lone: no other worker is in the session.

    Attributes:
        every: all parameters of the groups.
        dtypes, addresses: of `parameters`.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        chosen: Chosen,
        parameters: Sequence[Tensor],
        away: Away | None = None,
        *,
        stand_in: StandIn | None,
        lone: bool,
    ) -> None:
        self.chosen = chosen
        self.every = list(chain.from_iterable(groups))
        self.dtypes = [p.dtype for p in parameters]
        self.addresses = list(map(Tensor.data_ptr, parameters))
        self._parameters = parameters
        self._lengths = list(map(len, groups))
        self._sizes = list(map(Tensor.numel, parameters))
        self._forms = list(map(shape_dtype, parameters))
        self._stand_in = stand_in
        self._lone = lone
        self.away = Away(chosen.parameters, self._forms, {} if away is None else away.places)

    @property
    def group_count(self) -> int:
        """Return the number of groups."""
        return len(self._lengths)

    def match(self, groups: Sequence[Sequence[Tensor]]) -> bool:
        """Return whether these are the session's parameters, group by group, in the memory they had."""
        return (
            self._are(groups)
            and list(map(Tensor.data_ptr, self._parameters)) == self.addresses
            and list(map(Tensor.numel, self._parameters)) == self._sizes
            and [p.dtype for p in self._parameters] == self.dtypes
            and (not self.chosen.left or self.chosen.leaves(self.every))
            and self.away.is_still_so
        )

    def _are(self, groups: Sequence[Sequence[Tensor]]) -> bool:
        return list(map(len, groups)) == self._lengths and all(map(is_, chain.from_iterable(groups), self.every))

    def newly_away(self, groups: Sequence[Sequence[Tensor]]) -> Away | None:
        """Return the parameters that are away now; None if more differs than that. See `farstep.optim.away`."""
        if self._stand_in is None or not self._are(groups) or not self.chosen.leaves(self.every):
            return None
        return self.away.now(self._stand_in, lone=self._lone)

    def fitting(self, groups: Sequence[Mapping[str, Any]]) -> Chosen | None:
        """Return the parameters of the groups that fit in the place of these, one for one; None if they do not."""
        if [len(group["params"]) for group in groups] != self._lengths:
            return None
        try:
            chosen = chosen_of(groups, self.away.own)
        except TensorMismatch:
            return None
        if chosen.places != self.chosen.places:
            return None
        replaced = self._replaced(chosen)
        if replaced & set(self.away.own):
            return None
        away = self._away_among(chosen, replaced)
        return None if away is None or (away.places and not replaced) else chosen

    def away_among(self, chosen: Chosen) -> Away:
        """Return which of the parameters that `fitting` returned are away."""
        away = self._away_among(chosen, self._replaced(chosen))
        assert away is not None
        return away

    def _replaced(self, chosen: Chosen) -> set[Tensor]:
        return {p for p, before in zip(chosen.parameters, self.away.own, strict=True) if p is not before}

    def _away_among(self, chosen: Chosen, replaced: Collection[Tensor]) -> Away | None:
        """Return which of these parameters are away; None if one does not fit, such as a new one of another form."""
        away = [p for p, form in zip(chosen.parameters, self._forms, strict=True) if shape_dtype(p) != form]
        if not away:
            return Away(chosen.parameters, self._forms)
        if self._stand_in is None or any(p in replaced for p in away):
            return None
        before = {index: place for index, place in self.away.places.items() if chosen.parameters[index] not in replaced}
        return Away(chosen.parameters, self._forms, before).now(self._stand_in, lone=self._lone)

    def unfit(self, why: str = "") -> TensorMismatch:
        """Return the error for parameters that have another shape or dtype than the session's, and state of before."""
        now = zip(self.chosen.described, self.away.own, self._forms, strict=True)
        changed = [(described.name, p) for described, p, form in now if shape_dtype(p) != form]
        name, p = changed[0] if changed else ("", None)
        which = f"Parameter {name!r} is {tuple(p.shape)} by now" if p is not None else "A parameter has changed"
        return TensorMismatch(
            f"{which}, and its state is of what it was before{f' ({why})' if why else ''}.",
            remedy="Give it its values back first. One that is away for a while must have no gradient: p.grad = None.",
            field=name or None,
            side="client",
        )
