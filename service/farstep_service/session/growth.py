"""What a session becomes with one more param group: its plan, and its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from farstep.errors import InvalidOption, OptionsDiffer
from farstep.growth import AppendHead
from farstep.hyper import Hyper
from farstep.receipt import Receipt
from farstep_service.contents import PARAM, Contents
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.plan import Plan
from farstep_service.session.membership import Membership
from farstep_service.session.outcomes import told
from farstep_service.tensors.state import SessionState


@final
class Growth:
    """Add param groups to one session.

    Args:
        state: what grows.
        membership: which groups each worker knows.
    """

    def __init__(self, state: SessionState, membership: Membership) -> None:
        self._state = state
        self._membership = membership

    def check(self, plan: Plan, head: AppendHead) -> None:
        """Refuse a group that a session of this plan cannot have.

        Raises:
            NotInitialised, InvalidOption, TensorMismatch, LimitExceeded, OptionsDiffer: see `append`.
        """
        self._plan_with(plan, head)

    def append(self, plan: Plan, head: AppendHead, arrived: Contents) -> Receipt:
        """Let the state grow by a group, plan and memory, or note that a worker knows one that is there.

        Raises:
            NotInitialised: there is nothing yet that could grow.
            OptionsDiffer: there is such a group, with other options or parameters.
            InvalidOption, TensorMismatch, LimitExceeded: groups before it are missing, or it cannot be stored.
            Unavailable: there is no memory. Nothing has changed then, whatever the error.
        """
        base = self._state.version
        after = self._plan_with(plan, head)
        if after is plan:
            self._membership.known.learned(head.group, head.name)
            return Receipt(base, base, applied=False)
        try:
            self._state.append_arrived(after, arrived)
        except Exception as exc:
            raise told(exc, "The param group") from exc
        return Receipt(self._state.version, base)

    def _plan_with(self, plan: Plan, head: AppendHead) -> Plan:
        self._state.check_initialised()
        known = self._membership.groups(head.name.worker, len(plan.groups))
        return grown(plan, head, known=known, in_force=self._state.groups)


def room_for(plan: Plan, head: AppendHead) -> Contents:
    """Return memory for the parameters that a header announces."""
    layout = Layout.empty().append(segments_of(head))
    return Contents(layout, plan.rule, (PARAM,), range(len(layout.segments)))


def grown(plan: Plan, head: AppendHead, *, known: int, in_force: Sequence[Hyper]) -> Plan:
    """Return a plan with the group of a header, or the plan itself if it has that group.

    Args:
        known: how many groups the worker knows.
        in_force: the options of each group by now.

    Raises:
        InvalidOption: groups before it are missing, or an option is not acceptable.
        OptionsDiffer: the plan has another group of that number.
        TensorMismatch, LimitExceeded: a parameter cannot be stored.
    """
    if head.group > known:
        raise InvalidOption(
            f"Param group {head.group} cannot be added: worker {head.name.worker!r} knows {known} groups.",
            remedy="Add the groups in their order.",
            field="group",
            limit=known,
        )
    if head.group == len(plan.groups):
        return plan.append(head.options, segments_of(head))
    wanted = plan.first(head.group).append(head.options, segments_of(head))
    if difference := plan.first(head.group + 1).difference(wanted, in_force=in_force[: head.group + 1]):
        raise OptionsDiffer(
            f"Session {plan.name!r} has a param group {head.group}, but {difference}.",
            remedy="Add the group with the options and parameters that the other worker gave it.",
            field="group",
        )
    return plan


def segments_of(head: AppendHead) -> list[SegmentSpec]:
    """Return the parameters that a header announces, unchecked."""
    return [SegmentSpec(each.name, each.shape, each.dtype, head.group) for each in head.parameters]
