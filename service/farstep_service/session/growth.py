"""What a session becomes with one more param group."""

from __future__ import annotations

from collections.abc import Sequence

from farstep.errors import InvalidOption, OptionsDiffer
from farstep.protocol.growth import AppendHead
from farstep.protocol.hyper import Hyper
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.plan import Plan
from farstep_service.tensors.contents import PARAM, Contents


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
