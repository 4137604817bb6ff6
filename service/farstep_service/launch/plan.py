"""Which workers there are, and what each of them is told: variables, as torchrun sets them, and farstep's own.

    FARSTEP_SERVER, FARSTEP_SESSION, FARSTEP_WORKER     where its optimizer is; FARSTEP_TOKEN is handed on
    FARSTEP_RUN                                         the session's name, put before names that the script gives
    FARSTEP_RESTART, TORCHELASTIC_RESTART_COUNT         how often this worker was started again
    RANK, WORLD_SIZE                                    its number among all workers, and how many there are
    LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK            the same on this machine, and the machine's number
    TORCHELASTIC_MAX_RESTARTS, TORCHELASTIC_RUN_ID      the limit, and the session's name

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
class Plan:
    """State what is to be run.

    Attributes:
        command: the program of a worker and its arguments.
        workers: how many of them run on this machine.
        nodes: how many machines run as many.
        node: which of those this machine is.
        max_restarts: how often each worker is started again after it failed.
        stop_s: seconds that workers get to end by themselves when they are asked to.

    Raises:
        InvalidOption: a number that cannot be.
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
        """Return how many workers there are on all machines."""
        return self.workers * self.nodes

    def name(self, local: int) -> str:
        """Return the name of a worker of this machine; names sort as their ranks do."""
        return name_of_rank(self.node * self.workers + local, self.world)

    def environment(
        self, local: int, restarts: int, server: str, session: str, inherited: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the variables of a worker.

        Args:
            local: its number on this machine.
            restarts: how often it was started again.
            server, session: where its optimizer is.
            inherited: what it is told beside that, unless it is told so here.
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
        InvalidOption: there is no such script, or a module is to be run without Python.
    """
    if not python:
        if module:
            raise invalid_option("A module is run by Python.", "no_python", "Leave out --no-python or -m.")
        return (script, *arguments)
    if not module and not os.path.exists(script):
        raise invalid_option(f"There is no file {script!r:.200}.", "script", "Name a script, or a module with -m.")
    return (sys.executable, *(("-m",) if module else ()), script, *arguments)
