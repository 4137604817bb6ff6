"""The sessions of one server: found by name, each with its one actor."""

from farstep_service.sessions.actor import Actor
from farstep_service.sessions.answers import (
    OVERHEAD_BYTES,
    Answer,
    AtMost,
    Intake,
    Joined,
    Reader,
    Renewed,
    Summary,
    View,
    WorkerPage,
)
from farstep_service.sessions.readers import Outgoing
from farstep_service.sessions.shared_memory import SharedMemoryHandle, nbytes_beside

__all__ = [
    "OVERHEAD_BYTES",
    "Actor",
    "Answer",
    "AtMost",
    "Intake",
    "Joined",
    "Outgoing",
    "Reader",
    "Renewed",
    "SharedMemoryHandle",
    "Summary",
    "View",
    "WorkerPage",
    "nbytes_beside",
]
