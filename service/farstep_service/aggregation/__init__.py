"""Pure decisions about pushes: which are new, who takes part, and when they become a step."""

from farstep_service.aggregation.groups import KnownGroups
from farstep_service.aggregation.ledger import Entry, Ledger, mismatch
from farstep_service.aggregation.members import Members
from farstep_service.aggregation.modes import Abort, Aggregation, Barrier, Immediate, Skip, Step, aggregation_for

__all__ = [
    "Abort",
    "Aggregation",
    "Barrier",
    "Entry",
    "Immediate",
    "KnownGroups",
    "Ledger",
    "Members",
    "Skip",
    "Step",
    "aggregation_for",
    "mismatch",
]
