"""`farstep demo --chaos`: kill the server in the middle of the training, as `kill -9` does, and start it again.

    half of the steps are taken    SIGKILL: the process has no chance to save anything
    it has ended                   the same command, on the same directory and port

The workers are told nothing. They send the step that was cut off again under its name, until a server answers; whether
it had been applied is written down in the session, and so it counts once.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, final
from urllib.parse import urlsplit

from farstep_service.demo.reports import Report
from farstep_service.launch.children import Children, ProcessExited
from farstep_service.launch.own_server import SERVER, command_on_loopback

DURABILITY: Final = "journal:os"
"""Every step survives the process that took it; only a loss of power takes those that the disk has not got."""


@final
class Chaos:
    """Kill the demo's server once, and start it again.

    Args:
        processes: the server is one of them.
        directory: where it keeps its sessions.
        environment: the variables of the server.

    Attributes:
        kills: how often it was killed.
    """

    def __init__(self, processes: Children, directory: str, environment: Mapping[str, str]) -> None:
        self.kills = 0
        self._ending = False
        self._processes = processes
        self._options = ("--data-dir", directory, "--durability", DURABILITY)
        self._environment = environment

    def start(self, url: str = "") -> int:
        """Start the server, on the port of an earlier one if there was one, and return its process id."""
        port = (urlsplit(url).port if url else None) or 0
        return self._processes.start(SERVER, command_on_loopback(port, *self._options), self._environment)

    def strike(self, report: Report) -> bool:
        """Kill the server if half of the training is done, and a part of it is left; return whether that was now."""
        if self.kills or report.fingerprint or not report.steps <= 2 * report.version < 2 * report.steps:
            return False
        self.kills += 1
        self._ending = True
        self._processes.signal(SERVER, signal.SIGKILL)
        return True

    def take_exit(self, exited: ProcessExited) -> bool:
        """Return whether an exit of the server is the one that was brought about here."""
        mine, self._ending = self._ending and exited.code == -signal.SIGKILL, False
        return mine


@contextmanager
def data_directory() -> Iterator[str]:
    """Yield a directory for the server's sessions, and remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix="farstep-demo-", ignore_cleanup_errors=True) as directory:
        yield directory
