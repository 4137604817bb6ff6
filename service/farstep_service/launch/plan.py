"""The workers of a launch, and the variables of each: torchrun's, and farstep's own.

    FARSTEP_SERVER, FARSTEP_SESSION, FARSTEP_WORKER     the session of its optimizer, and its name in it
    FARSTEP_RUN                                         the session's name, as the prefix of names in the script
    FARSTEP_RESTART, TORCHELASTIC_RESTART_COUNT         how often this worker was restarted
    RANK, WORLD_SIZE                                    its number among all workers, and their number
    LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK            the same on this machine, and the machine's number
    TORCHELASTIC_MAX_RESTARTS, TORCHELASTIC_RUN_ID      the limit of restarts, and the session's name

A worker also inherits the launcher's variables, FARSTEP_TOKEN among them.

There is no MASTER_ADDR: workers meet in the session, and form no process group.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farstep.errors import invalid_option
from farstep.identity import name_of_rank

MOST_WORKERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """Describe the workers of a launch.

    Attributes:
        command: the program of a worker and its arguments.
        workers: their number on this machine.
        nodes: the number of machines, each with as many workers.
        node: the number of this machine, from 0.
        max_restarts: how often each worker that failed is restarted.
        stop_s: seconds that workers get to end after a signal.

    Raises:
        InvalidOption: a number is out of range.
    """

    command: tuple[str, ...]
    workers: int = 1
    nodes: int = 1
    node: int = 0
    max_restarts: int = 3
    stop_s: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.workers * self.nodes <= MOST_WORKERS:
            raise invalid_option(
                f"Invalid workers: {self.workers} on each of {self.nodes} machines. There are 1 to {MOST_WORKERS}.",
                field="nproc_per_node",
                limit=MOST_WORKERS,
            )
        if not 0 <= self.node < self.nodes:
            raise invalid_option(
                f"Invalid node_rank: {self.node} of {self.nodes} machines, which are numbered from 0.",
                field="node_rank",
            )

    @property
    def world(self) -> int:
        """Return the number of workers on all machines."""
        return self.workers * self.nodes

    def name(self, local: int) -> str:
        """Return the name of a worker of this machine; names sort as ranks do."""
        return name_of_rank(self.node * self.workers + local, self.world)

    def environment(
        self, local: int, restarts: int, server: str, session: str, inherited: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the variables of a worker.

        Args:
            local: its number on this machine.
            restarts: how often it was restarted.
            server, session: URL and name of its optimizer's session.
            inherited: the launcher's variables; the worker's own replace them.
        """
        crowded = {"OMP_NUM_THREADS": "1"} if self.workers > 1 else {}
        defaults = {**crowded, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        return {
            **defaults,
            **inherited,
            "FARSTEP_SERVER": server,
            "FARSTEP_SESSION": session,
            "FARSTEP_RUN": session,
            "FARSTEP_WORKER": self.name(local),
            "FARSTEP_RESTART": str(restarts),
            "RANK": str(self.node * self.workers + local),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(self.workers),
            "GROUP_RANK": str(self.node),
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
            "TORCHELASTIC_RUN_ID": session,
        }


def command_of(script: str, arguments: Sequence[str], *, module: bool = False, python: bool = True) -> tuple[str, ...]:
    """Return a worker's command: `python script arguments`, `python -m script arguments`, or the script by itself.

    Raises:
        InvalidOption: the script does not exist, or `module` is true without Python.
    """
    if not python:
        if module:
            raise invalid_option("A module is run by Python.", "no_python", "Leave out --no-python or -m.")
        return (script, *arguments)
    if not module and not os.path.exists(script):
        raise invalid_option(f"There is no file {script!r:.200}.", "script", "Name a script, or a module with -m.")
    return (sys.executable, *(("-m",) if module else ()), script, *arguments)
