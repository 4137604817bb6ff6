"""The sessions of one server: found by name, each with its one actor."""

from farstep_service.sessions.actor import LocalHost
from farstep_service.sessions.answers import (
    Answer,
    AtMost,
    Host,
    Intake,
    Joined,
    Reader,
    Renewed,
    Summary,
    View,
    WorkerPage,
)
from farstep_service.sessions.readers import Outgoing
from farstep_service.sessions.shared import Offer, nbytes_beside
from farstep_service.sessions.views import OVERHEAD_BYTES

__all__ = [
    "OVERHEAD_BYTES",
    "Answer",
    "AtMost",
    "Host",
    "Intake",
    "Joined",
    "LocalHost",
    "Offer",
    "Outgoing",
    "Reader",
    "Renewed",
    "Summary",
    "View",
    "WorkerPage",
    "nbytes_beside",
]
