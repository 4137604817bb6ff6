"""One server as a process: its socket, its share of the machine, its life from the first signal to the last answer."""

from farstep_service.server.process import check_device, check_device_name
from farstep_service.server.running import Listening, run

__all__ = ["Listening", "check_device", "check_device_name", "run"]
