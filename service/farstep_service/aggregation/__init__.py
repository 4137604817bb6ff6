"""Pure decisions about pushes: which are new, who takes part, and when they become a step."""

from farstep_service.aggregation.decisions import Abort, Decision, Pushed, Refuse, Skip, Step
from farstep_service.aggregation.groups import KnownGroups
from farstep_service.aggregation.ledger import Entry, Ledger, mismatch
from farstep_service.aggregation.members import Members
from farstep_service.aggregation.modes import Aggregation
from farstep_service.aggregation.options import Agreed, Said, agreed
from farstep_service.aggregation.rounds import Rounds, aggregation_for, places_of

__all__ = [
    "Abort",
    "Aggregation",
    "Agreed",
    "Decision",
    "Entry",
    "KnownGroups",
    "Ledger",
    "Members",
    "Pushed",
    "Refuse",
    "Rounds",
    "Said",
    "Skip",
    "Step",
    "aggregation_for",
    "agreed",
    "mismatch",
    "places_of",
]
