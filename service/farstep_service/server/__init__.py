"""One server as a process: its sockets, its resources, and its life from start to shutdown."""

from farstep_service.server.process import check_device, check_device_name
from farstep_service.server.running import Listening, run

__all__ = ["Listening", "check_device", "check_device_name", "run"]
