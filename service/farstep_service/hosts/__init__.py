"""Where sessions live: one interface, and the host in this process."""

from farstep_service.hosts.eager import begin, in_task
from farstep_service.hosts.host import Answer, AtMost, Host, Intake, Joined, Reader, Renewed, Summary, View, WorkerPage
from farstep_service.hosts.local import LocalHost
from farstep_service.hosts.readers import Outgoing
from farstep_service.hosts.shared import Offer, nbytes_beside
from farstep_service.hosts.views import OVERHEAD_BYTES

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
    "begin",
    "in_task",
    "nbytes_beside",
]
