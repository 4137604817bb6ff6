"""Views: other values of the parameters that a session keeps, such as their average.

    pull_view    a copy of them
    swap_to      them in the parameters' place, as long as a `with` block lasts
    write_view   others in their place, as after a checkpoint was loaded

`ema` is the average that a session with `ema=...` keeps; ASGD's is its state entry `ax`, which is written as state is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from farstep.errors import TensorMismatch, invalid_option
from farstep.optim.in_session import InSession
from farstep.optim.membership import Membership


class WithViews(InSession):
    """Base of `RemoteOptimizer`."""

    averages: ClassVar[tuple[str, ...]] = ()
    """State entries that are averages of the parameter they belong to."""

    @property
    def views(self) -> tuple[str, ...]:
        """The names of the session's views."""
        return (*self._membership.settings.policies.views, *self.averages)

    @property
    def shown(self) -> str:
        """The view whose values the parameters have at the moment; "" if they have their own."""
        return self._membership.shown

    def pull_view(self, view: str) -> list[Tensor]:
        """Return a copy of a view, one tensor per parameter in the order of the groups.

        Before the first step, and for a parameter that has not stepped, it is the parameter itself.

        Raises:
            InvalidOption: the session has no such view.
            FarstepError: no answer came in time.
        """
        member = self._viewed(view)
        if view not in self.averages:
            return member.link.read_view(view)
        states = member.link.read_state(range(len(member.parameters)))
        own = [state and state[view] for state in states]
        return [
            value if isinstance(value, Tensor) else p.detach().clone()
            for value, p in zip(own, member.parameters, strict=True)
        ]

    @contextmanager
    def swap_to(self, view: str) -> Iterator[None]:
        """Give the parameters the values of a view inside a `with` block, and restore their own after it, bit for bit.

        Writes to the parameters inside are lost. A step there raises an error.

        Raises:
            InvalidOption: the session has no such view.
            FarstepError: the parameters have a view's values already, or no answer came in time.
        """
        member = self._viewed(view)
        member.check_training(f"swap_to({view!r})")
        parameters, values = list(member.parameters), self.pull_view(view)
        own = [p.detach().clone() for p in parameters]
        member.shown = view
        try:
            _copy(parameters, values)
            del values
            yield
        finally:
            _copy(parameters, own)
            member.shown = ""

    def write_view(self, view: str, values: Sequence[Tensor]) -> None:
        """Replace a view that the session keeps by values such as `pull_view` returns.

        Raises:
            InvalidOption: the session has no such view, or it is state: write that into `state`.
            TensorMismatch: other shapes or dtypes than the parameters'.
            FarstepError: the session refused it, or `Unavailable`.
        """
        member = self._viewed(view)
        if view in self.averages:
            raise invalid_option(f"{view!r} is state.", remedy=f"Write state[p][{view!r}].", field="view")
        forms = [(p.shape, p.dtype) for p in member.parameters]
        if [(value.shape, value.dtype) for value in values] != forms:
            raise TensorMismatch(
                f"The values for {view!r} are not of the parameters' shapes and dtypes.", field="view", side="client"
            )
        member.link.write_view(view, values)

    def _viewed(self, view: str) -> Membership:
        """Return the membership if it has that view."""
        member = self._looked_at()
        if view not in self.views:
            raise invalid_option(
                f"Session {self.session!r} has no view {view!r:.80}; it has {', '.join(self.views) or 'none'}.",
                remedy="Create the session with ema=..., the decay of an average of the parameters.",
                field="view",
            )
        if member.fits:
            self._settle(member)
        return member


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
