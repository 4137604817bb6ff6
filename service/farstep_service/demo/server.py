"""The server process of the demo. This module is light: the server loads torch while the demo does."""

from __future__ import annotations

import json

from farstep.errors import FarstepError
from farstep_service.demo.processes import Processes

SERVER = "server"
START_S = 120.0
"""How long the server may take to listen: it imports torch."""


def start_server(processes: Processes, *, port: int = 0) -> int:
    """Start a server on loopback and return its process id; `server_url` waits until it listens."""
    serve = ("-m", "farstep_service", "serve", "--host", "127.0.0.1", "--port", str(port), "--json")
    return processes.start(SERVER, *serve)


def server_url(processes: Processes) -> str:
    """Return the URL of the server, when it listens.

    Raises:
        ProcessEnded: it did not start.
    """
    line = processes.line_of(SERVER, START_S)
    try:
        return str(json.loads(line)["url"])
    except (ValueError, TypeError, KeyError) as exc:
        raise FarstepError(f"The server's first line is not its address: {line:.200}", side="client") from exc
