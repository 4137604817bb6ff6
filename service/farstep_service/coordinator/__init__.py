"""Pure decisions about pushes: which are new, who takes part, and when they become a step."""

from farstep_service.coordinator.groups import KnownGroups
from farstep_service.coordinator.ledger import Entry, Ledger, mismatch
from farstep_service.coordinator.members import Members
from farstep_service.coordinator.modes.decisions import Abort, Decision, Pushed, Refuse, Skip, Step
from farstep_service.coordinator.modes.mode import Aggregation
from farstep_service.coordinator.options import Agreed, Said, agreed
from farstep_service.coordinator.rounds import Rounds, aggregation_for, places_of

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
